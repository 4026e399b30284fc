"""Comparing two ways to compute one thing: values, and the gradients of everything they depend on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.tolerances import assert_close


def assert_equal(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Equal up to the rounding of float64; whole numbers exactly."""
    import os

    if os.environ.get("REC") and actual.is_floating_point() and actual.numel():
        a, e = actual.detach().double(), expected.detach().double()
        big = e[e.isfinite()].abs().max().item() if e.isfinite().any() else 0
        err = (a - e)[e.isfinite()].abs().max().item()
        open("/tmp/rec", "a").write(
            f"{err / big if big else err} {actual.dtype} {os.environ.get('PYTEST_CURRENT_TEST')} {name}\n"
        )
        return
    if actual.is_floating_point():
        assert_close(actual, expected, "model", name)
    else:
        assert torch.equal(actual, expected), name


def gradients(out: Tensor, inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Of a fixed random projection of `out`; zeros where `out` does not depend on an input."""
    projection = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
    found = torch.autograd.grad((out * projection).sum(), inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def assert_equal_with_gradients(actual: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> None:
    """`inputs` by name, so that a failure says whose gradient is wrong."""
    assert_equal(actual, expected)
    pairs = zip(gradients(actual, list(inputs.values())), gradients(expected, list(inputs.values())), strict=True)
    for name, (ours, theirs) in zip(inputs, pairs, strict=True):
        assert_equal(ours, theirs, f"gradient of {name}")
