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
    ("conv", F64): Tolerance(0, 1e-14, "a dozen sums in another order; seen: 4e-16"),
    ("conv", F32): Tolerance(0, 2e-6, "a dozen sums in another order; seen: 1e-7"),
    ("conv", BF16): Tolerance(0, 3e-2, "each tap's product and sum is rounded to 8 significant bits; seen: 8e-3"),
    ("grouped_linear", F64): Tolerance(0, 1e-14, "short sums in another order; seen: 4e-16"),
    ("grouped_linear", F32): Tolerance(0, 2e-6, "short sums in another order; seen: 1e-7"),
    ("grouped_linear", BF16): Tolerance(2**-8, 1e-4, "summed in float32 and rounded once to 8 significant bits"),
    ("routing", F64): Tolerance(0, 1e-14, "sums over a token's experts in another order; seen: TODO"),
    ("routing", F32): Tolerance(0, 2e-6, "sums over a token's experts in another order; seen: TODO"),
    ("experts", F64): Tolerance(0, 1e-12, "a convolution, products and a cell one behind the other; seen: TODO"),
    ("experts", F32): Tolerance(0, 1e-4, "that of the cells, which is far above that of the products; seen: TODO"),
    ("slstm", F64): Tolerance(0, 1e-13, "the same operations step by step, sums in another order; seen: 9e-15"),
    ("slstm", F32): Tolerance(
        0, 1e-4, "an input gate at -50 loses 4e-6 of its exponential, and the recurrence carries it on; seen: 2e-5"
    ),
    ("slstm", BF16): Tolerance(2**-8, 1e-4, "a float32 result rounded once to 8 significant bits"),
}


def assert_close(
    actual: Tensor, expected: Tensor, op: str, name: str = "result", *, computed_in: torch.dtype | None = None
) -> None:
    """Holds `actual` against the oracle's `expected` with the bound of `op` for the dtype of `actual`.

    Infinite entries (the stabiliser before the first token) must agree exactly; NaN never passes.

    Args:
        computed_in: the dtype of the arithmetic where the result is kept in another one.
    """
    tolerance = TOLERANCES[op, computed_in or actual.dtype]
    actual, expected = actual.detach(), expected.detach()
    finite = expected[expected.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        rtol=tolerance.relative,
        atol=tolerance.of_largest * largest,
        msg=lambda message: f"{name} of {op} ({actual.dtype}): {message}\nThe bound's reason: {tolerance.reason}",
    )
