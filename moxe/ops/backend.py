"""Which implementation of the cells runs, and in which precision.

`auto` is resolved once for a device, and said once in the log; nothing changes the choice in the middle of a run.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

BACKENDS = ("reference", "torch")

logger = logging.getLogger(__name__)


@cache
def resolve_backend(name: str, device_type: str) -> str:
    """The backend that `name` means on a device.

    Raises:
        ValueError: when there is no backend of that name.
    """
    if name == "auto":
        logger.info("backend 'auto' is 'torch' on %s", device_type)
        return "torch"
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not one of: auto, {', '.join(BACKENDS)}")
    return name


def core_dtype(x: Tensor) -> torch.dtype:
    """Precision of gates, stabilisers and states: float64 for float64 inputs, else float32."""
    return torch.promote_types(x.dtype, torch.float32)
