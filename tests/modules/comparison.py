"""Comparing two ways to compute one thing: values, and the gradients of everything they depend on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT64_MODULE = {'rtol': 1e-9, 'atol': 1e-10}


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **FLOAT64_MODULE)


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
        torch.testing.assert_close(ours, theirs, **FLOAT64_MODULE, msg=lambda m, name=name: f"gradient of {name}: {m}")
