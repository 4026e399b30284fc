"""What memory an expert keeps: its forget gates, and how far back in the text it still has half of a token's weight.

Of what an expert wrote at its own token i, f_{i+1} f_{i+2} ... f_j is left at its token j; every channel of the memory,
a head of an mLSTM or a unit of an sLSTM, has gates of its own. The reach of token j in a channel is the distance in the
text to the earliest i of which at least one half is left. If that is the expert's first token in the text, a longer
text may show a longer reach: the observation is right-censored, and the quantiles are those of Kaplan and Meier.

Legend: S tokens of a text, K experts a token, n tokens of one expert, C channels, J tokens whose reach is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from moxe.errors import UserError
from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM, MoxELayer
from moxe.modules.mlstm import MLSTMBlocks
from moxe.modules.slstm import SLSTMBlocks

QUANTILES = (0.1, 0.5, 0.9)
"""Of the reach, over the tokens and channels of an expert."""
MAX_CHANNELS = 64  # kept of an expert, evenly spaced: all units of a wide sLSTM would take gigabytes
MAX_TOKENS = 512  # whose reach is taken, evenly spaced over an expert's tokens
_HALF = math.log(2)
# A gate below one half ends every reach, however small it is; so bounded, the sums behind it keep their digits.
_LOWEST_LOG_FORGET = -2 * _HALF
_ROUNDING = 1e-12  # of an estimated distribution function


@dataclass(eq=False)
class ForgetGates:
    """The forget gates of one expert along its own sub-sequence of a text, over all calls of a recording.

    Args:
        parts: log f of each call, [tokens, channels] float32 on the CPU; of more than 64 channels, 64 evenly spaced.
        total: sum of f over all tokens and all channels.
        count: number of summed gates.
    """

    parts: list[Tensor] = field(default_factory=list)
    total: float = 0.0
    count: int = 0

    def add(self, log_forget: Tensor) -> None:
        """log f [tokens, ...] of the expert's next tokens; whatever follows the first axis is channels."""
        log_forget = log_forget.flatten(1)
        self.total += float(log_forget.double().exp().sum())
        self.count += log_forget.numel()
        channels = _evenly_spaced(log_forget.shape[1], MAX_CHANNELS).to(log_forget.device)
        self.parts.append(log_forget[:, channels].float().cpu())

    @property
    def log_forget(self) -> Tensor:
        """log f [n, channels], float32 on the CPU."""
        return torch.cat(self.parts) if self.parts else torch.empty(0, 0)

    @property
    def mean(self) -> float | None:
        """Mean f over all tokens and all channels; None without a token."""
        return self.total / self.count if self.count else None


@dataclass(frozen=True, eq=False)
class MemoryRecording:
    """What `record_memory` saw: for each layer the forget gates of each expert, None where experts keep no memory."""

    layers: list[list[ForgetGates | None]]


@dataclass(frozen=True)
class ExpertMemory:
    """The memory of one expert over one text.

    Args:
        tokens: how many tokens that the model read were routed to it; a start token before the text is one of them.
        mean_forget_gate: mean f over its tokens and channels, from 0 to 1; None without a token.
        reach_quantiles: the 0.1, 0.5 and 0.9 quantiles of the reach, in tokens of the text, over its tokens and
            channels; None where the quantile lies beyond what the text can show.
        reach_bound: the largest reach that was seen, cut off or not; a quantile that is None lies beyond it.
    """

    tokens: int
    mean_forget_gate: float | None
    reach_quantiles: list[float | None]
    reach_bound: int


@contextmanager
def record_memory(model: MoxEForCausalLM) -> Iterator[MemoryRecording]:
    """Records the forget gates of all experts while the model reads one text.

    Within the context the model may be called any number of times, with the consecutive parts of one text: one row,
    one document, and the state carried by `cache_params`. Every call but the first needs two tokens: on the CPU a
    single token takes a step in C++ that shows no gates. The gates are computed apart, so reading takes longer, and
    nothing that the model computes changes. Afterwards, also after an error, the model is as before.

    Raises:
        UserError: for a model without experts.
        ValueError: from the call of the model, when it has more than one sequence, does not go on where the last call
            stopped, or takes such a step.
    """
    if not isinstance(model.config, MoxEConfig):
        raise UserError(f"{type(model).__name__} has no experts with a memory: a MoxEForCausalLM is needed")
    layers = []
    with ExitStack() as hooks:
        for layer in model.model.layers:
            assert isinstance(layer, MoxELayer)
            if not layer.experts.keeps_state:
                layers.append([None] * layer.num_experts)
                continue
            gates = [ForgetGates() for _ in range(layer.num_experts)]
            layers.append(gates)
            hooks.callback(layer.register_forward_pre_hook(partial(_check_call, gates)).remove)
            for kind, (first, last) in layer.experts.ranges.items():
                block = layer.experts.get_submodule(kind)
                hooks.callback(block.register_forward_hook(partial(_add_gates, gates[first:last])).remove)
        yield MemoryRecording(layers)


def _check_call(gates: list[ForgetGates], layer: MoxELayer, args: tuple) -> None:
    """Before the forward pass of a layer: everything that it is about to do with its experts will be seen."""
    _, tokens, _, at = args
    if at is None:
        raise ValueError("a call with a single token shows no forget gates: give each call at least two tokens")
    sequences = tokens.sequences.num_segments
    if sequences > 1:
        raise ValueError(f"memory is recorded over one sequence, but the call has {sequences}")
    if gates[0].parts and not bool(at.continues.all()):
        raise ValueError("the call begins anew: give it the cache_params that the call before it returned")


@torch.no_grad()
def _add_gates(gates: list[ForgetGates], block: MLSTMBlocks | SLSTMBlocks, args: tuple, output: object) -> None:
    """After the forward pass of a stack of experts over one sequence, whose rows are sorted by expert, then time."""
    x, segments, state, _ = args
    tokens = torch.tensor(segments.row_offsets).diff().tolist()
    for expert, log_forget in zip(gates, block.forget_gates(x, segments, state).split(tokens), strict=True):
        expert.add(log_forget)


def memory_of_experts(recording: MemoryRecording, expert_indices: Sequence[Tensor]) -> list[list[ExpertMemory | None]]:
    """The memory of each expert of each layer; None for experts that keep none.

    Args:
        recording: of the whole text.
        expert_indices: for each layer the experts of each token of the whole text, [S, K]; -1 where there is no token.

    Raises:
        ValueError: when the routing is not that of the recorded text.
    """
    memories = []
    for gates_of_layer, indices in zip(recording.layers, expert_indices, strict=True):
        memories.append([])
        for expert, gates in enumerate(gates_of_layer):
            if gates is None:
                memories[-1].append(None)
                continue
            positions = (indices == expert).any(-1).nonzero().flatten().cpu()
            memories[-1].append(expert_memory(gates.log_forget, positions, gates.mean))
    return memories


def expert_memory(log_forget: Tensor, positions: Tensor, mean_forget_gate: float | None) -> ExpertMemory:
    """The memory of one expert.

    Args:
        log_forget: [n, C] log f of each of its tokens.
        positions: [n] where in the text they stand, rising.
        mean_forget_gate: over all channels, of which `log_forget` may hold a part.

    Raises:
        ValueError: when these are not of the same tokens.
    """
    tokens = len(positions)
    if len(log_forget) != tokens:
        raise ValueError(f"there are forget gates of {len(log_forget)} tokens but positions of {tokens}")
    if not tokens:
        return ExpertMemory(0, mean_forget_gate, [None] * len(QUANTILES), 0)
    reach, censored = reaches(log_forget, positions)
    return ExpertMemory(
        tokens=tokens,
        mean_forget_gate=mean_forget_gate,
        reach_quantiles=_quantiles(reach, censored),
        reach_bound=int(reach.max()),
    )


def reaches(log_forget: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """How far back tokens of an expert reach: to the earliest i with log f_{i+1} + ... + log f_j >= -log 2.

    Args:
        log_forget: [n, C], n > 0.
        positions: [n] in the text, rising.

    Returns:
        The reach [J, C] in tokens of the text, 0 where only the token itself is left, and whether it is censored
        [J, C]: it goes back to the expert's first token. J = min(n, 512) tokens, evenly spaced, the first and the last
        among them.
    """
    # [C, n], never falling, in float64: to be told apart are sums over a whole text that differ by log 2.
    forgotten = -log_forget.double().clamp(min=_LOWEST_LOG_FORGET).cumsum(0).T.contiguous()
    here = _evenly_spaced(len(positions), MAX_TOKENS)
    earliest = torch.searchsorted(forgotten, forgotten[:, here] - _HALF).T
    return positions[here, None] - positions[earliest], earliest == 0


def _quantiles(reach: Tensor, censored: Tensor) -> list[float | None]:
    """The smallest reach r with P(reach <= r) >= q, for each q; None where the estimate of P ends below q."""
    sample = stats.CensoredData.right_censored(reach.flatten().numpy(), censored.flatten().numpy())
    estimate = stats.ecdf(sample).cdf
    places = np.searchsorted(estimate.probabilities, np.array(QUANTILES) - _ROUNDING)
    return [float(estimate.quantiles[place]) if place < len(estimate.quantiles) else None for place in places]


def _evenly_spaced(count: int, at_most: int) -> Tensor:
    """At most that many of the numbers 0 to count - 1, both ends among them."""
    return torch.linspace(0, max(count - 1, 0), min(count, at_most), dtype=torch.float64).round().long()
