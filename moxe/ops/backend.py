"""Which implementation of the cells runs, and in which precision.

Legend: none; only the dtype of a tensor matters here.

`auto` is resolved once for a device, and said once in the log; nothing changes the choice in the middle of a run.

    reference   the equations, token by token; the oracle
    torch       torch's own operations, on every device
    cpu         C++ for the processor, compiled on first use (`moxe.ops.cpu.build`)
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moxe.errors import UserError
from moxe.ops.cpu import build

BACKENDS = ("reference", "torch", "cpu")

logger = logging.getLogger(__name__)


def resolve_backend(name: str, device_type: str) -> str:
    """The backend that `name` means on a device.

    Raises:
        UserError: when there is no backend of that name, or not for that device or on this machine.
    """
    if name == "auto":
        return _automatic(device_type)
    if name not in BACKENDS:
        raise UserError(f"backend={name!r} is not one of: auto, {', '.join(BACKENDS)}")
    if name == "cpu":
        if device_type != "cpu":
            raise UserError(f"backend='cpu' is for tensors on the CPU, not on {device_type!r}: use 'torch' or 'auto'")
        if reason := _why_no_cpu():
            raise UserError(reason)
    return name


@torch.compiler.assume_constant_result
def _why_no_cpu() -> str | None:
    return build.why_unavailable()


@torch.compiler.assume_constant_result
def _automatic(device_type: str) -> str:
    return _choose(device_type)


@cache
def _choose(device_type: str) -> str:
    if device_type != "cpu":
        choice, reason = "torch", None
    else:
        reason = build.why_unavailable()
        choice = "torch" if reason else "cpu"
    if reason:
        logger.warning("backend 'auto' is 'torch', which is slower here: %s", reason)
    else:
        logger.info("backend 'auto' is %r on %s", choice, device_type)
    return choice


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Switches autocast off; the meta device knows none."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def core_dtype(x: Tensor) -> torch.dtype:
    """Precision of gates, stabilisers and states: float64 for float64 inputs, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """bfloat16 under an autocast to it, else the dtype of x; autocast leaves float64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.bfloat16 if torch.get_autocast_dtype(device) == torch.bfloat16 else x.dtype


class _NoContext:
    """Stands in for a Function's context where no backward pass will come."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass


def apply_function(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, or with gradients off its forward pass alone: a tenth of the overhead, felt when decoding."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function.apply(*arguments)
    return function.forward(_NoContext(), *arguments)
