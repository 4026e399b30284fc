"""Comparing two ways to compute one thing: values, and the gradients of everything they depend on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.tolerances import TOLERANCES, assert_close


def assert_equal(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Equal up to rounding; whole numbers exactly."""
    if actual.is_floating_point():
        assert_close(actual, expected, "model", name)
    else:
        assert torch.equal(actual, expected), name


def gradients(out: Tensor, inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Of a fixed random projection of `out`; zeros where `out` does not depend on an input."""
    projection = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
    return list(torch.autograd.grad((out * projection).sum(), inputs, materialize_grads=True, retain_graph=True))


def assert_equal_with_gradients(actual: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> None:
    """`inputs` by name, so that a failure says whose gradient is wrong."""
    assert_equal(actual, expected)
    ours, theirs = gradients(actual, list(inputs.values())), gradients(expected, list(inputs.values()))
    assert_equal_gradients(dict(zip(inputs, ours, strict=True)), dict(zip(inputs, theirs, strict=True)))


def assert_equal_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """By name. Where a gradient is 0, what rounding leaves of it is measured by the largest gradient of all."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in actual.items():
        if (expected[name] == 0).all():
            assert (gradient.abs() <= TOLERANCES["model", gradient.dtype].of_largest * largest).all(), name
        else:
            assert_equal(gradient, expected[name], f"gradient of {name}")
