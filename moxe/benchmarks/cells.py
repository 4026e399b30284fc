"""How fast and how exact are the two cells beside those of the official package?

Legend: B rows, S tokens a row, N = B S packed tokens, H heads, Dh head size, D = H Dh.

Forward and backward of the cell alone in float32, on the same numbers: ours over packed segments, the official sLSTM
cell (in plain torch) and the official mLSTM in its parallel form. The error of each is that of its output and of the
gradient of its inputs against our op in float64, which the check before holds against the reference, token by token.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moxe.benchmarks import peers
from moxe.benchmarks.checks import FLOAT64_BOUND, relative_error, require
from moxe.benchmarks.machine import available_memory
from moxe.benchmarks.report import Figure, Report, milliseconds
from moxe.benchmarks.timing import time_in_turn
from moxe.ops.mlstm import mlstm
from moxe.ops.segments import Segments
from moxe.ops.slstm import slstm

TITLE = "Cells: forward and backward, float32"
COLUMNS = [
    "cell",
    "B x S",
    "H x Dh",
    "side",
    "ms (range)",
    "MoxE's speed / its",
    "error of output",
    "error of gradients",
]
FLOAT32_BOUND = 1e-3  # between two float32 implementations, where n . q nearly cancels
_CHECK_ROWS, _CHECK_LENGTH, _CHECK_HEADS, _CHECK_SIZE = 2, 17, 2, 8
# Tensors [B, H, S, S] that the official parallel form holds at once, forward and backward, seen from above.
_SQUARES = 16


@dataclass(frozen=True)
class Cell:
    kind: str
    rows: int
    length: int
    heads: int
    head_size: int


@dataclass(frozen=True)
class Sizes:
    cells: tuple[Cell, ...]
    seconds_a_side: float = 60.0


FULL = Sizes(
    (
        Cell("slstm", 8, 256, 4, 160),
        Cell("mlstm", 8, 256, 4, 320),
        Cell("mlstm", 8, 2048, 4, 160),
        Cell("mlstm", 8, 2048, 4, 320),
    )
)
QUICK = Sizes((Cell("slstm", 2, 32, 2, 16), Cell("mlstm", 2, 64, 2, 16)), seconds_a_side=1.0)


def measure(sizes: Sizes, *, repeats: int) -> Report:
    """Times ours beside the official cells, each on the shapes of `sizes`."""
    official = peers.is_available("xlstm")
    report = Report("cells", TITLE, COLUMNS, check=_check(official))
    for wanted in sizes.cells:
        cell = _that_fits(wanted)
        if cell != wanted:
            report.notes.append(
                f"{wanted.rows} rows of {wanted.length} tokens do not fit this memory: measured on {cell.rows}"
            )
        _measure_cell(report, cell, official, repeats, sizes.seconds_a_side)
    return report


def _that_fits(cell: Cell) -> Cell:
    memory = available_memory()
    squares = _SQUARES * 4 * cell.rows * cell.heads * cell.length**2
    if cell.kind == "slstm" or memory is None or squares < memory:
        return cell
    return Cell(cell.kind, 1, cell.length, cell.heads, cell.head_size)


def _measure_cell(report: Report, cell: Cell, official: bool, repeats: int, seconds_a_side: float) -> None:
    inputs = _inputs(cell)
    sides = {"MoxE": _ours(cell, inputs, "auto")}
    if official:
        sides["official"] = _official(cell, inputs)
    exact = _ours(cell, {name: x.double() for name, x in inputs.items()}, "auto")()
    errors = {}
    for side, run in sides.items():
        output, *gradients = run()
        errors[side] = (
            relative_error(output, exact[0]),
            max(relative_error(*pair) for pair in zip(gradients, exact[1:], strict=True)),
        )
        del output, gradients
    del exact
    samples = time_in_turn(sides, repeats=repeats, seconds_a_side=seconds_a_side)
    shape = f"{cell.rows} x {cell.length}", f"{cell.heads} x {cell.head_size}"
    about = {"cell": cell.kind, "rows": cell.rows, "length": cell.length, "head_size": cell.head_size}
    about |= {"heads": cell.heads}
    for side, own in samples.items():
        ratio = own.median / samples["MoxE"].median
        report.add_row(
            cell.kind,
            *shape,
            side,
            milliseconds(own),
            "" if side == "MoxE" else f"{ratio:.2f}",
            *(f"{error:.0e}" for error in errors[side]),
        )
        report.add_timing(side, own, **about, ours_over_this=ratio)
        for name, error in zip(("error of output", "error of gradients"), errors[side], strict=True):
            report.figures.append(Figure(side, name, (error,), about))
    if not official:
        report.add_row(cell.kind, *shape, "official", peers.NOT_MEASURED, "", "", "")


def _check(official: bool) -> str:
    found = []
    for kind in ("slstm", "mlstm"):
        cell = Cell(kind, _CHECK_ROWS, _CHECK_LENGTH, _CHECK_HEADS, _CHECK_SIZE)
        single = _inputs(cell)
        double = {name: x.double() for name, x in single.items()}
        timed, reference = (_ours(cell, double, backend)() for backend in ("auto", "reference"))
        error = max(relative_error(*pair) for pair in zip(timed, reference, strict=True))
        found.append(require(f"{kind} in float64 against the reference", error, FLOAT64_BOUND))
        if official:
            pairs = zip(_ours(cell, single, "auto")(), _official(cell, single)(), strict=True)
            error = max(relative_error(*pair) for pair in pairs)
            found.append(require(f"{kind} in float32 against the official cell", error, FLOAT32_BOUND))
    return "; ".join(found)


def _inputs(cell: Cell) -> dict[str, Tensor]:
    """Random inputs with ordinary gates, in the layout of our ops."""
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    tokens, heads, size = cell.rows * cell.length, cell.heads, cell.head_size
    projection = {"projection": random(tokens, heads, size)}
    if cell.kind == "slstm":
        recurrent = random(1, heads, size, 4, size) / size**0.5
        return {"gates": random(tokens, heads, 4, size), "recurrent": recurrent, **projection}
    q, k, v = (random(tokens, heads, size) for _ in range(3))
    return {
        "q": q,
        "k": k,
        "v": v,
        "igate": random(tokens, heads),
        "fgate": random(tokens, heads) + 4.0,
        **projection,
    }


def _ours(cell: Cell, inputs: dict[str, Tensor], backend: str) -> Callable[[], tuple[Tensor, ...]]:
    op = {"slstm": slstm, "mlstm": mlstm}[cell.kind]
    leaves = [x.detach().requires_grad_() for name, x in inputs.items() if name != "projection"]
    projection = inputs["projection"]

    def run() -> tuple[Tensor, ...]:
        segments = Segments.from_lengths([cell.length] * cell.rows)
        h, _ = op(*leaves, segments, backend=backend)
        return h.detach(), *torch.autograd.grad(h, leaves, projection)

    return run


def _official(cell: Cell, inputs: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The official cell on the same numbers in its own layout; results come back in the layout of ours."""
    return (_official_slstm if cell.kind == "slstm" else _official_mlstm)(cell, inputs)


def _official_slstm(cell: Cell, inputs: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    xlstm = peers.official_package()
    width = cell.heads * cell.head_size
    theirs: Any = xlstm.sLSTMLayer(
        xlstm.sLSTMLayerConfig(embedding_dim=width, num_heads=cell.heads, backend="vanilla")
    ).slstm_cell
    kernel = theirs._recurrent_kernel_
    with torch.no_grad():
        kernel.copy_(theirs._recurrent_kernel_ext2int(inputs["recurrent"][0]))
        theirs._bias_.zero_()
    rows, length = cell.rows, cell.length
    # [N, H, 4, Dh] -> [B, S, 4 H Dh]
    gates = inputs["gates"].transpose(1, 2).reshape(rows, length, 4 * width).requires_grad_()
    projection = _heads_first(cell, inputs["projection"])

    def run() -> tuple[Tensor, ...]:
        h, _ = theirs(gates)  # [B, H, S, Dh]
        d_gates, d_kernel = torch.autograd.grad(h, [gates, kernel], projection)
        ours = d_gates.reshape(-1, 4, cell.heads, cell.head_size).transpose(1, 2)
        return _tokens_first(h.detach()), ours, theirs._recurrent_kernel_int2ext(d_kernel)[None]

    return run


def _official_mlstm(cell: Cell, inputs: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    parallel = importlib.import_module("xlstm.blocks.mlstm.backends").parallel_stabilized_simple
    qkv = [_heads_first(cell, inputs[name]).requires_grad_() for name in ("q", "k", "v")]
    gates = [_heads_first(cell, inputs[name][..., None]).requires_grad_() for name in ("igate", "fgate")]
    projection = _heads_first(cell, inputs["projection"])
    mask = torch.ones(cell.length, cell.length, dtype=torch.bool).tril()

    def run() -> tuple[Tensor, ...]:
        # It adds `eps` to the normaliser, which the equations do not have.
        h = parallel(*qkv, *gates, lower_triangular_matrix=mask, eps=0.0)
        gradients = [_tokens_first(g) for g in torch.autograd.grad(h, [*qkv, *gates], projection)]
        return _tokens_first(h.detach()), *gradients[:3], *(gradient[..., 0] for gradient in gradients[3:])

    return run


def _heads_first(cell: Cell, x: Tensor) -> Tensor:
    """[N, H, ...] -> [B, H, S, ...]"""
    return x.unflatten(0, (cell.rows, cell.length)).transpose(1, 2).contiguous()


def _tokens_first(x: Tensor) -> Tensor:
    """[B, H, S, ...] -> [N, H, ...]"""
    return x.transpose(1, 2).flatten(0, 1)
