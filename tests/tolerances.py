"""How far a result may lie from the float64 oracle: the one table, by op and dtype, each bound with its reason.

The oracle gets the very inputs that the op gets, rounded to their dtype first, so a bound covers the op's own arithmetic
alone. Each bound is about ten times the largest error seen over the cases of its tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """|actual - expected| <= relative |expected| + of_largest max |expected|, the largest being taken over the tensor."""

    relative: float
    of_largest: float
    reason: str


F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16

TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    ("mlstm", F64): Tolerance(
        0, 1e-12, "sums of up to 100 terms in another order, and divisors that nearly cancel; errors seen: 6e-14"
    ),
    ("mlstm", F32): Tolerance(
        0,
        1e-4,
        "a log-weight is a difference of gate sums; 32 shut gates sum to -640, where float32 resolves 6e-5; seen: 2e-5",
    ),
    ("mlstm", BF16): Tolerance(2**-8, 1e-4, "a float32 result rounded once to 8 significant bits"),
    ("slstm", F64): Tolerance(0, 1e-13, "the same operations step by step, sums in another order; seen: 9e-15"),
    ("slstm", F32): Tolerance(
        0, 1e-4, "an input gate at -50 loses 4e-6 of its exponential, and the recurrence carries it on; seen: 2e-5"
    ),
    ("slstm", BF16): Tolerance(2**-8, 1e-4, "a float32 result rounded once to 8 significant bits"),
}


def assert_close(actual: Tensor, expected: Tensor, op: str, name: str = "result") -> None:
    """Holds `actual` against the oracle's `expected` with the bound of `op` for the dtype of `actual`.

    Infinite entries (the stabiliser before the first token) must agree exactly; NaN never passes.
    """
    tolerance = TOLERANCES[op, actual.dtype]
    finite = expected[expected.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        rtol=tolerance.relative,
        atol=tolerance.of_largest * largest,
        msg=lambda message: f"{name} of {op} ({actual.dtype}): {message}\nThe bound's reason: {tolerance.reason}",
    )
