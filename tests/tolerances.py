"""How far a result may lie from the float64 oracle: the one table, by op and dtype, each bound with its reason.

The oracle gets the very inputs that the op gets, rounded to their dtype first, so a bound covers the op's own
arithmetic alone. "Seen" is the largest error over the cases of the tests, as a part of the tensor's largest value;
bounds lie several times above it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """|actual - expected| <= relative |expected| + of_largest max |expected|; the maximum is that of the tensor."""

    relative: float
    of_largest: float
    reason: str


F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16

TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    ("conv", F64): Tolerance(0, 1e-14, "a dozen sums in another order; seen: 4e-16"),
    ("conv", F32): Tolerance(0, 2e-6, "a dozen sums in another order; seen: 1e-7"),
    ("conv", BF16): Tolerance(0, 3e-2, "each tap's product and sum is rounded to 8 significant bits; seen: 8e-3"),
    ("grouped_linear", F64): Tolerance(0, 1e-14, "short sums in another order; seen: 4e-16"),
    ("grouped_linear", F32): Tolerance(0, 2e-6, "short sums in another order; seen: 1e-7"),
    ("grouped_linear", BF16): Tolerance(2**-8, 1e-4, "summed in float32, then rounded once to 8 significant bits"),
    ("projections", F64): Tolerance(0, 1e-13, "products and, of those, gates; sums in another order"),
    ("projections", F32): Tolerance(0, 1e-5, "products and, of those, gates; sums in another order"),
    ("projections", BF16): Tolerance(2**-8, 1e-4, "summed in float32, then rounded once to 8 significant bits"),
    ("routing", F64): Tolerance(0, 1e-14, "a sum over a token's experts in another order; seen: 2e-16"),
    ("routing", F32): Tolerance(0, 2e-6, "a sum over a token's experts in another order; seen: 1e-7"),
    ("norm", F64): Tolerance(0, 5e-14, "sums over a row in another order; seen: 5e-15"),
    ("norm", F32): Tolerance(0, 1e-5, "sums over a row in another order; seen: 1e-6"),
    ("norm", BF16): Tolerance(2**-8, 1e-4, "a float32 result rounded once to 8 significant bits"),
    ("gating", F64): Tolerance(0, 2e-14, "a normalisation, products and a sigmoid; seen: 1e-15"),
    ("gating", F32): Tolerance(0, 4e-6, "a normalisation, products and a sigmoid; seen: 4e-7"),
    ("gating", BF16): Tolerance(2**-8, 1e-4, "a float32 result rounded once to 8 significant bits"),
    ("routing", BF16): Tolerance(2**-8, 1e-4, "a float32 result rounded once to 8 significant bits"),
    ("mlstm", F64): Tolerance(0, 2e-12, "other orders of sums, enlarged where n . q nearly cancels; seen: 2e-13"),
    ("mlstm", F32): Tolerance(
        0,
        3e-4,
        "n . q nearly cancels (seen: 5e-5, in the reference too); 32 shut gates sum to -640, good to 6e-5 (seen: 2e-5)",
    ),
    ("mlstm", BF16): Tolerance(2**-8, 3e-4, "a float32 result rounded once to 8 significant bits"),
    ("slstm", F64): Tolerance(0, 1e-13, "the same operations a step, sums in another order; seen: 1e-14"),
    ("slstm", F32): Tolerance(0, 1e-4, "e^-50 is good to 4e-6, and the recurrence carries it on; seen: 1e-5"),
    ("slstm", BF16): Tolerance(2**-8, 1e-4, "a float32 result rounded once to 8 significant bits"),
    ("experts", F64): Tolerance(0, 1e-13, "products and a cell with ordinary gates; seen: 3e-15"),
    ("experts", F32): Tolerance(0, 2e-5, "products and a cell with ordinary gates; seen: 7e-7"),
    ("step", F64): Tolerance(0, 5e-14, "one token of a block, sums in another order; seen: 3e-15"),
    ("step", F32): Tolerance(0, 2e-5, "one token of a block, sums in another order; seen: 1.3e-6"),
    ("step", BF16): Tolerance(
        2**-8,
        1e-3,
        "computed in float32 (seen: 9e-7); but an input kept for the convolution may round to either neighbour",
    ),
    ("model", F64): Tolerance(
        0, 2e-12, "blocks and whole models with all gradients, sums in another order; seen: 2e-13"
    ),
    ("model", F32): Tolerance(0, 1e-4, "a dozen blocks one behind the other; seen over 32 models: 1.4e-5"),
    ("transformers", F64): Tolerance(
        0, 1e-5, "norms, attention's softmax and rotary positions are float32 in transformers, whatever the model is"
    ),
    ("transformers", F32): Tolerance(0, 1e-4, "a few layers, sums in another order"),
    ("model", BF16): Tolerance(2e-2, 0, "products in autocast; the loss of 32 models was off by at most 5e-3"),
}


def assert_close(
    actual: Tensor,
    expected: Tensor,
    op: str,
    name: str = "result",
    *,
    computed_in: torch.dtype | None = None,
    largest_term: float = 0.0,
) -> None:
    """Holds `actual` against the oracle's `expected` with the bound of `op` for the dtype of `actual`.

    Infinite entries (the stabiliser before the first token) must agree exactly; NaN never passes.

    Args:
        computed_in: the dtype of the arithmetic where the result is kept in another one.
        largest_term: of the terms that cancel in the result; eight roundings of it are allowed on top, since a result
            that is exactly 0 comes out as the rounding of its terms.
    """
    tolerance = TOLERANCES[op, computed_in or actual.dtype]
    actual, expected = actual.detach(), expected.detach()
    finite = expected[expected.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        rtol=tolerance.relative,
        atol=tolerance.of_largest * largest + 8 * torch.finfo(computed_in or actual.dtype).eps * largest_term,
        msg=lambda message: f"{name} of {op} ({actual.dtype}): {message}\nThe bound's reason: {tolerance.reason}",
    )
