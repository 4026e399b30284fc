"""Both cells in each of their implementations, on inputs of every kind, with everything that comes out of them.

Legend: N packed tokens, H heads, Dh head size, G segments, E groups (weight sets).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moxe.ops.mlstm import MLSTMState, mlstm
from moxe.ops.mlstm.cpu import mlstm_cpu
from moxe.ops.mlstm.reference import mlstm_reference
from moxe.ops.mlstm.torch_backend import mlstm_torch
from moxe.ops.segments import Segments
from moxe.ops.slstm import SLSTMState, slstm
from moxe.ops.slstm.reference import slstm_reference

HEADS, SIZE = 2, 4

State = MLSTMState | SLSTMState
# Token inputs, weights and, if there is an initial state, c0, n0, m0 (and h0), all by name.
Inputs = dict[str, Tensor]
# (inputs, segments) -> h [N, H, Dh] and the state behind each segment.
Run = Callable[[Inputs, Segments], tuple[Tensor, State]]


@dataclass(frozen=True)
class Cell:
    name: str
    state_type: type[MLSTMState] | type[SLSTMState]
    token_inputs: tuple[str, ...]  # [N, ...]
    weights: tuple[str, ...]
    low_precision: tuple[str, ...]  # what autocast hands over in bfloat16
    draw: Callable[[Segments, str, torch.Generator], Inputs]
    through: Callable[[str], Run]  # the public op with a backend of that name
    implementations: dict[str, Run]
    reference: Run  # in float64

    @property
    def state_inputs(self) -> tuple[str, ...]:
        return tuple(f"{field}0" for field in self.state_type._fields)

    def initial_state(self, inputs: Inputs) -> State | None:
        return self.state_type(*(inputs[name] for name in self.state_inputs)) if "c0" in inputs else None

    def make_inputs(
        self, segments: Segments, dtype: torch.dtype, *, gates: str = "ordinary", with_state: bool = False
    ) -> Inputs:
        """Token inputs, weights and, if asked for, the state that three tokens before each segment left behind.

        Every other segment's initial state is empty (m = -inf). States are float32 at least.
        """
        generator = torch.Generator().manual_seed(segments.num_tokens)
        inputs = self.draw(segments, gates, generator)
        if with_state:
            lengths = [3 * ((g + 1) % 2) for g in range(segments.num_segments)]
            before = Segments.from_lengths(lengths, segments.group_offsets)
            _, state = self.reference(self.draw(before, "ordinary", generator), before)
            inputs |= with_initial_state(inputs, state)
        core_dtype = torch.promote_types(dtype, torch.float32)
        return {name: x.to(dtype if name in self.low_precision else core_dtype) for name, x in inputs.items()}

    def oracle(self, inputs: Inputs, segments: Segments) -> dict[str, Tensor]:
        """`results` of the reference in float64 for the very same values."""
        return results(self.reference, {name: x.double() for name, x in inputs.items()}, segments)


def with_initial_state(inputs: Inputs, state: State) -> Inputs:
    """The inputs with `state` as initial state."""
    return inputs | {f"{field}0": x for field, x in zip(state._fields, state, strict=True)}


def true_memory(state: State) -> list[Tensor]:
    """What the state stands for, whatever its scale: C e^m, n e^m (and h)."""
    scale = state.m.exp()
    scaled = [x * scale.reshape(*scale.shape, *[1] * (x.ndim - scale.ndim)) for x in (state.c, state.n)]
    return [*scaled, state.h] if isinstance(state, SLSTMState) else scaled


def results(
    run: Run, inputs: Inputs, segments: Segments, outputs_of: Callable[[State], Sequence[Tensor]] | None = None
) -> dict[str, Tensor]:
    """h, the final state and the gradient of every input but m0, for a loss that weighs all outputs at random.

    Args:
        outputs_of: what of the state enters the loss; without it all but m, as it is written down.
    """
    leaves = {name: x.clone().requires_grad_(name != "m0") for name, x in inputs.items()}
    h, final = run(leaves, segments)
    of_state = [x for x in final if x is not final.m] if outputs_of is None else outputs_of(final)
    outputs = {"h": h} | {f"final {field}": x for field, x in zip(final._fields, final, strict=True)}
    return {name: x.detach() for name, x in outputs.items()} | gradients([h, *of_state], leaves)


def gradients(outputs: Sequence[Tensor], leaves: Inputs) -> dict[str, Tensor]:
    """Of a loss that weighs all outputs at random; with whole numbers, so that they are the same in every dtype."""
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for out in outputs:
        loss = loss + (out.double() * torch.randint(-9, 10, out.shape, generator=generator)).sum()
    wanted = {f"gradient of {name}": x for name, x in leaves.items() if x.requires_grad}
    if not loss.requires_grad:  # the reference without a token and without an initial state
        return {name: torch.zeros_like(x) for name, x in wanted.items()}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(wanted, grads, strict=True))


def _coins(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).double() * 2 - 1


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# From a shape to igate and fgate of it.
GATES: dict[str, Callable[[tuple[int, ...], torch.Generator], tuple[Tensor, Tensor]]] = {
    "ordinary": lambda shape, g: (2 * _normal(shape, g), 2 * _normal(shape, g) + 1),
    "all ±50": lambda shape, g: (50 * _coins(shape, g), 50 * _coins(shape, g)),
    "forget gate shut": lambda shape, g: (_normal(shape, g), _normal(shape, g) / 10 - 20),
    "forget gate open": lambda shape, g: (_normal(shape, g), _normal(shape, g) / 10 + 20),
    "input gate shut": lambda shape, g: (_normal(shape, g) / 10 - 50, _normal(shape, g)),
    "forget gate now open, now shut": lambda shape, g: (_normal(shape, g), 11.5 * _coins(shape, g) - 8.5),
}


def _draw_mlstm(segments: Segments, gates: str, generator: torch.Generator) -> Inputs:
    shape = (segments.num_tokens, HEADS, SIZE)
    inputs = {name: _normal(shape, generator) for name in ("q", "k", "v")}
    return inputs | dict(zip(("igate", "fgate"), GATES[gates](shape[:2], generator), strict=True))


def _draw_slstm(segments: Segments, gates: str, generator: torch.Generator) -> Inputs:
    shape = (segments.num_tokens, HEADS, SIZE)
    zgate, ogate = (50 * _coins(shape, generator) if "±50" in gates else _normal(shape, generator) for _ in range(2))
    recurrent = _normal((segments.num_groups, HEADS, SIZE, 4, SIZE), generator) / SIZE**0.5
    return {"gates": torch.stack([*GATES[gates](shape, generator), zgate, ogate], 2), "recurrent": recurrent}


def _mlstm_through(backend: str) -> Run:
    def run(inputs: Inputs, segments: Segments) -> tuple[Tensor, State]:
        state = MLSTM.initial_state(inputs)
        assert state is None or isinstance(state, MLSTMState)
        q, k, v, igate, fgate = (inputs[name] for name in MLSTM.token_inputs)
        h, final = mlstm(q, k, v, igate, fgate, segments, initial_state=state, return_final_state=True, backend=backend)
        assert final is not None
        return h, final

    return run


def _mlstm_in_chunks_of(longest: int, op: Callable = mlstm_torch) -> Run:
    def run(inputs: Inputs, segments: Segments) -> tuple[Tensor, State]:
        tokens = [inputs[name] for name in MLSTM.token_inputs]
        state = [inputs.get(name) for name in MLSTM.state_inputs]
        h, *final = op(*tokens, segments.cu_seqlens, *state, longest, True)
        return h, MLSTMState(*final)

    return run


def _mlstm_by_reference(inputs: Inputs, segments: Segments) -> tuple[Tensor, State]:
    shape = (segments.num_segments, HEADS)
    c, n = torch.zeros(*shape, SIZE, SIZE, dtype=torch.float64), torch.zeros(*shape, SIZE, dtype=torch.float64)
    state = MLSTM.initial_state(inputs) or (c, n, torch.full(shape, -torch.inf, dtype=torch.float64))
    q, k, v, igate, fgate = (inputs[name] for name in MLSTM.token_inputs)
    h, *final = mlstm_reference(q, k, v, igate, fgate, segments.cu_seqlens, *state)
    return h, MLSTMState(*final)


def _slstm_through(backend: str) -> Run:
    def run(inputs: Inputs, segments: Segments) -> tuple[Tensor, State]:
        state = SLSTM.initial_state(inputs)
        assert state is None or isinstance(state, SLSTMState)
        tensors = inputs["gates"], inputs["recurrent"]
        h, final = slstm(*tensors, segments, initial_state=state, return_final_state=True, backend=backend)
        assert final is not None
        return h, final

    return run


def _slstm_by_reference(inputs: Inputs, segments: Segments) -> tuple[Tensor, State]:
    zeros = torch.zeros(segments.num_segments, HEADS, SIZE, dtype=torch.float64)
    state = SLSTM.initial_state(inputs) or (zeros, zeros, torch.full_like(zeros, -torch.inf), zeros)
    offsets = list(segments.group_offsets)
    h, *final = slstm_reference(inputs["gates"], inputs["recurrent"], segments.cu_seqlens, offsets, *state)
    return h, SLSTMState(*final)


MLSTM = Cell(
    name="mlstm",
    state_type=MLSTMState,
    token_inputs=("q", "k", "v", "igate", "fgate"),
    weights=(),
    low_precision=("q", "k", "v"),
    draw=_draw_mlstm,
    through=_mlstm_through,
    implementations={
        "reference": _mlstm_through("reference"),
        "torch": _mlstm_through("torch"),
        "torch, chunks of 5": _mlstm_in_chunks_of(5),
        "torch, chunks of 1": _mlstm_in_chunks_of(1),
        "cpu": _mlstm_through("cpu"),
        "cpu, chunks of 5": _mlstm_in_chunks_of(5, mlstm_cpu),
        "cpu, chunks of 1": _mlstm_in_chunks_of(1, mlstm_cpu),
    },
    reference=_mlstm_by_reference,
)
SLSTM = Cell(
    name="slstm",
    state_type=SLSTMState,
    token_inputs=("gates",),
    weights=("recurrent",),
    low_precision=("gates",),
    draw=_draw_slstm,
    through=_slstm_through,
    implementations={backend: _slstm_through(backend) for backend in ("reference", "torch", "cpu")},
    reference=_slstm_by_reference,
)
IMPLEMENTATIONS = [(cell, name) for cell in (MLSTM, SLSTM) for name in cell.implementations]
