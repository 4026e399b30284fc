"""How far is a training step from the time its matrix products alone would take?

Legend: M, K, N sizes of a product [M, K] x [K, N].

The floor is the FLOPs of every product of the step (`moxe.benchmarks.products`) divided by the rate at which this
machine multiplies matrices of the model's own shapes, by torch or by our own products, whichever is faster for a shape;
each is measured beside the steps in the same process.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moxe.benchmarks import peers
from moxe.benchmarks.checks import check_model
from moxe.benchmarks.machine import Precision, arithmetic
from moxe.benchmarks.peers import LABELS, OURS, Setting
from moxe.benchmarks.products import forward_products, training_flops
from moxe.benchmarks.report import Figure, Report, milliseconds, number
from moxe.benchmarks.timing import Samples, time_in_turn
from moxe.benchmarks.training import training_step
from moxe.models.configuration_moxe import MoxEConfig
from moxe.ops.grouped_matmul import grouped_matmul, multiplies_in_cpp

TITLE = "Floor: our training step beside its matrix products alone"
COLUMNS = [
    "precision",
    "product rate, GFLOP/s",
    "floor, ms",
    "step, ms (range)",
    "step / floor",
    "tokens/s at the floor",
]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp32 medium", "bf16")
TORCH, OWN = "torch.mm", "moxe"
# Block-diagonal and gate products are too narrow to show what the machine can do.
_NARROWEST = 64


@dataclass(frozen=True)
class Sizes:
    model: dict[str, Any]
    rows: int
    length: int
    seconds_a_side: float = 30.0
    flops_a_sample: float = 4e9  # a product is repeated as often: alone, a small one would be timed with cold caches


FULL = Sizes({"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4}, rows=8, length=256)
QUICK = Sizes(
    {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1},
    rows=2,
    length=64,
    seconds_a_side=1.0,
    flops_a_sample=1e7,
)

Shape = tuple[int, int, int]


def measure(sizes: Sizes, *, repeats: int) -> Report:
    """Times the step and the products in each precision, all in turn."""
    report = Report("floor", TITLE, COLUMNS, check=check_model())
    config = MoxEConfig(**sizes.model)
    flops = training_flops(config, sizes.rows, sizes.length)
    tokens = sizes.rows * sizes.length
    size = f"{number(flops / 1e9)} GFLOP a step of {tokens:,} tokens, {number(flops / tokens / 1e6)} MFLOP a token"
    report.notes.append(
        f"{size}; the rate is the median of those of the model's wide products, each in the faster library"
    )
    shapes = product_shapes(config, sizes.rows, sizes.length)
    sides: dict[str, Callable[[], object]] = {}
    for precision in PRECISIONS:
        trainee = peers.build(OURS, config, sizes.length, Setting(precision))
        step = training_step(trainee, Setting(precision), sizes.rows, sizes.length, config.vocab_size)
        sides[f"step {precision}"] = step
        for library, shape in _multipliers(precision, shapes):
            times = _times(shape, sizes)
            sides[_name(precision, library, shape)] = _multiplication(precision, library, shape, times)
    samples = time_in_turn(sides, repeats=repeats, warm_up=2, seconds_a_side=sizes.seconds_a_side)
    for precision in PRECISIONS:
        rates = {
            (library, shape): [
                _times(shape, sizes) * _flops(shape) / s / 1e9
                for s in samples[_name(precision, library, shape)].seconds
            ]
            for library, shape in _multipliers(precision, shapes)
        }
        _add_precision(report, precision, flops, tokens, rates, samples[f"step {precision}"])
    return report


def product_shapes(config: MoxEConfig, rows: int, length: int) -> list[Shape]:
    """The different shapes of the wide products of a forward pass."""
    shapes = {
        (round(p.rows), p.inner, p.columns)
        for p in forward_products(config, rows, length)
        if min(p.inner, p.columns) >= _NARROWEST
    }
    return sorted(shapes)


def _dtype(precision: Precision) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _multipliers(precision: Precision, shapes: list[Shape]) -> list[tuple[str, Shape]]:
    """What multiplies each shape: torch, and our own products where the model takes them on this processor."""
    by_torch = [(TORCH, shape) for shape in shapes]
    return by_torch + [
        (OWN, shape) for shape in shapes if multiplies_in_cpp("auto", "cpu", _dtype(precision), *shape[1:])
    ]


def _name(precision: Precision, library: str, shape: Shape) -> str:
    return f"{precision} {library} {'x'.join(map(str, shape))}"


def _times(shape: Shape, sizes: Sizes) -> int:
    """Products of a shape in one sample."""
    return math.ceil(sizes.flops_a_sample / _flops(shape))


def _flops(shape: Shape) -> int:
    return 2 * math.prod(shape)


def _multiplication(precision: Precision, library: str, shape: Shape, times: int) -> Callable[[], object]:
    dtype = _dtype(precision)
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, inner, generator=generator).to(dtype)
    b = torch.randn(inner, columns, generator=generator).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    weight = b.float()[None]

    def multiply() -> None:
        with arithmetic("fp32 medium" if precision == "fp32 medium" else "fp32"):
            for _ in range(times):
                if library == TORCH:
                    torch.mm(a, b, out=out)
                else:
                    grouped_matmul(a, weight, (0, rows), transposed=True, in_cpp=True)

    return multiply


def _add_precision(
    report: Report,
    precision: Precision,
    flops: float,
    tokens: int,
    rates: dict[tuple[str, Shape], list[float]],
    step: Samples,
) -> None:
    """Adds a row and its figures; `rates` are the GFLOP/s of every sample of every shape."""
    fastest: dict[Shape, float] = {}
    for (library, shape), own in rates.items():
        about = {"precision": precision, "shape": list(shape)}
        report.figures.append(Figure(library, "GFLOP/s", tuple(own), about))
        fastest[shape] = max(fastest.get(shape, 0.0), statistics.median(own))
    rate = statistics.median(fastest.values())
    floor = flops / (1e9 * rate)
    report.add_row(
        precision,
        number(rate),
        number(1e3 * floor),
        milliseconds(step),
        f"{step.median / floor:.2f}",
        number(tokens / floor),
    )
    report.add_timing(
        LABELS[OURS], step, precision=precision, floor_milliseconds=1e3 * floor, step_over_floor=step.median / floor
    )
