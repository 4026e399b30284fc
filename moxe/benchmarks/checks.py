"""What must hold before anything is timed: the fast implementation computes what the reference computes.

Legend: B rows, S tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moxe.benchmarks.report import CheckFailed
from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM

FLOAT64_BOUND = 1e-8
FLOAT32_BOUND = 1e-3
_TINY: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "num_experts": 4}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference as a part of the largest expected value; infinite where a value is not finite."""
    difference = (actual.detach().double() - expected.detach().double()).abs().max()
    error = difference / expected.detach().double().abs().max().clamp_min(1e-300)
    return error.item() if error.isfinite() else float("inf")


def require(what: str, error: float, bound: float) -> str:
    """What was found, in words.

    Raises:
        CheckFailed: when the error is not below the bound.
    """
    if not error < bound:
        raise CheckFailed(f"{what}: relative error {error:.1e}, allowed is {bound:.0e}")
    return f"{what}: relative error {error:.1e}"


def check_model(*, rows: int = 2, length: int = 33) -> str:
    """Loss and every gradient of a tiny model with the backend that is timed, against the reference in float64.

    In float64, where the bound is sharp, with blocks of q, k and v as narrow as its vectors; and in float32 with the
    sizes of blocks that are timed.

    Raises:
        CheckFailed: when they differ.
    """
    cases: list[tuple[torch.dtype, float, dict[str, Any]]] = [
        (torch.float64, FLOAT64_BOUND, {"qkv_block_size": 4}),
        (torch.float32, FLOAT32_BOUND, {}),
    ]
    found = []
    for dtype, bound, settings in cases:
        expected = _loss_and_gradients(tiny_model("reference", **settings), rows, length)
        actual = _loss_and_gradients(tiny_model("auto", dtype, **settings), rows, length)
        # Each tensor on its own scale: the gradients of one matrix can be tiny beside those of another.
        error = max(relative_error(*pair) for pair in zip(actual, expected, strict=True))
        kind = str(dtype).removeprefix("torch.")
        found.append(require(f"loss and gradients of a {kind} model against the reference", error, bound))
    return "; ".join(found)


def _loss_and_gradients(model: MoxEForCausalLM, rows: int, length: int) -> list[Tensor]:
    model.train()
    loss = model(input_ids=(ids := tiny_ids(rows, length)), labels=ids).loss
    loss.backward()
    return [loss, *(p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters())]


def tiny_model(backend: str, dtype: torch.dtype = torch.float64, **settings: Any) -> MoxEForCausalLM:
    """A small model whose weights are far from their start, where gates and routers would be near constant."""
    torch.manual_seed(0)
    model = MoxEForCausalLM(MoxEConfig(**(_TINY | settings), backend=backend))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def tiny_ids(rows: int, length: int) -> Tensor:
    """Random tokens [B, S] of the tiny model's vocabulary."""
    return torch.randint(0, _TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(2))
