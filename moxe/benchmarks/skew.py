"""Do the experts slow down when the router prefers a few of them?

Legend: N packed tokens, D hidden size, E experts, K experts a token.

Forward and backward of the experts of one layer in float32, once with every expert as likely as any other and once with
shares that fall as 1, 1/2, 1/3, ... (Zipf) inside each half, so that both kinds of experts keep their work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from moxe.benchmarks.checks import FLOAT64_BOUND, relative_error, require
from moxe.benchmarks.report import Report, milliseconds
from moxe.benchmarks.timing import time_in_turn
from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.modules.experts import Experts
from moxe.ops.segments import Segments

TITLE = "Skew: forward and backward of the experts of a layer, float32"
COLUMNS = ["assignments", "largest share", "ms (range)", "against balanced"]


@dataclass(frozen=True)
class Sizes:
    hidden_size: int
    num_experts: int
    experts_per_token: int
    rows: int
    length: int
    seconds_a_side: float = 60.0


FULL = Sizes(hidden_size=640, num_experts=8, experts_per_token=2, rows=8, length=256)
QUICK = Sizes(hidden_size=32, num_experts=8, experts_per_token=2, rows=2, length=32, seconds_a_side=1.0)


def measure(sizes: Sizes, *, repeats: int) -> Report:
    """Times balanced and skewed assignments in turn, on the same experts."""
    report = Report("skew", TITLE, COLUMNS, check=_check())
    experts = _experts(sizes, "auto")
    chosen = {"balanced": balanced(sizes), "Zipf": zipf(sizes)}
    runs = {name: _step(experts, sizes, indices, torch.float32) for name, indices in chosen.items()}
    samples = time_in_turn(runs, repeats=repeats, seconds_a_side=sizes.seconds_a_side)
    for name, own in samples.items():
        share = (chosen[name].flatten().bincount(minlength=sizes.num_experts).max() / chosen[name].numel()).item()
        ratio = own.median / samples["balanced"].median
        report.add_row(name, f"{share:.0%}", milliseconds(own), f"{ratio:.2f}")
        report.add_timing(name, own, largest_share=share, time_over_balanced=ratio)
    return report


def balanced(sizes: Sizes) -> Tensor:
    """[N, K] distinct experts for each token, all equally likely."""
    return _draw(sizes, torch.ones(sizes.num_experts))


def zipf(sizes: Sizes) -> Tensor:
    """[N, K] distinct experts for each token; the likelihood inside each half falls as 1, 1/2, 1/3, ..."""
    half = 1 / torch.arange(1, sizes.num_experts // 2 + 1)
    return _draw(sizes, half.repeat(2))


def _draw(sizes: Sizes, likelihood: Tensor) -> Tensor:
    tokens = sizes.rows * sizes.length
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(likelihood.expand(tokens, -1), sizes.experts_per_token, generator=generator)


def _experts(sizes: Sizes, backend: str) -> Experts:
    """The experts of a model's layer, so that they are what a model has."""
    torch.manual_seed(0)
    config = MoxEConfig(
        vocab_size=8,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=1,
        num_experts=sizes.num_experts,
        num_experts_per_tok=sizes.experts_per_token,
        backend=backend,
    )
    return cast(Experts, MoxEForCausalLM(config).model.layers[0].experts)


def _step(experts: Experts, sizes: Sizes, indices: Tensor, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """Gives the output and the gradients of the input and of every parameter."""
    tokens = sizes.rows * sizes.length
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, sizes.hidden_size, generator=generator).to(dtype).requires_grad_()
    weights = torch.softmax(torch.randn(indices.shape, generator=generator), dim=-1).to(dtype)
    projection = torch.randn(tokens, sizes.hidden_size, generator=generator).to(dtype)
    leaves = [x, *experts.parameters()]

    def run() -> list[Tensor]:
        sequences = Segments.from_lengths([sizes.length] * sizes.rows)
        y = experts(x, indices, weights, sequences, lambda kind, rows: None, None)
        return [y.detach(), *torch.autograd.grad(y, leaves, projection)]

    return run


def _check() -> str:
    sizes = Sizes(hidden_size=32, num_experts=4, experts_per_token=2, rows=2, length=9)
    results = []
    for backend in ("auto", "reference"):
        experts = _experts(sizes, backend).double()
        results.append(_step(experts, sizes, zipf(sizes), torch.float64)())
    error = max(relative_error(*pair) for pair in zip(*results, strict=True))
    return require("experts in float64 against the reference", error, FLOAT64_BOUND)
