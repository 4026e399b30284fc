"""Norms of the gradients: of each parameter, and of each part of the model.

The norm of a model's gradient is that of its parameters' norms, so all of them come from one pass over the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moxe.models.accounting import part_of


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """The norm of the gradient of each parameter that has one, by name; 0-d tensors on their device."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # What torch's own clipping calls: on a GPU, few kernels for all of them.
    return dict(zip(gradients, torch.ops.aten._foreach_norm(list(gradients.values())), strict=True))


def total_norm(norms: Mapping[str, Tensor]) -> Tensor:
    """The norm of all gradients together, 0-d: bit for bit what `torch.nn.utils.get_total_norm` gives."""
    return torch.linalg.vector_norm(torch.stack(list(norms.values())))


def part_norms(norms: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of each part of a MoxE (`part_of`) from those of its parameters, by their names in the whole model.

    The squares add up to that of the total norm. A part without one is left out; a tied head is in the embedding.
    """
    squares: dict[str, float] = {}
    for name, square in zip(norms, torch.stack(list(norms.values())).double().square().tolist(), strict=True):
        part = part_of(name)
        squares[part] = squares.get(part, 0.0) + square
    return {part: square**0.5 for part, square in squares.items()}
