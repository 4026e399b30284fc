"""Which implementation of the cells runs, and in which precision.

Legend: none; only the dtype of a tensor matters here.

`auto` is resolved once for a device, and said once in the log; nothing changes the choice in the middle of a run.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

BACKENDS = ("reference", "torch")

logger = logging.getLogger(__name__)


def resolve_backend(name: str, device_type: str) -> str:
    """The backend that `name` means on a device.

    Raises:
        ValueError: when there is no backend of that name.
    """
    if name == "auto":
        if not torch.compiler.is_compiling():
            _say_once("torch", device_type)
        return "torch"
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not one of: auto, {', '.join(BACKENDS)}")
    return name


@cache
def _say_once(choice: str, device_type: str) -> None:
    logger.info("backend 'auto' is %r on %s", choice, device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Switches autocast off; the meta device knows none."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def core_dtype(x: Tensor) -> torch.dtype:
    """Precision of gates, stabilisers and states: float64 for float64 inputs, else float32."""
    return torch.promote_types(x.dtype, torch.float32)
