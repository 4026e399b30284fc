"""The memory that the sLSTM cell carries from token to token.

Legend: G segments, H heads, Dh head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moxe.ops.backend import core_dtype


class SLSTMState(NamedTuple):
    """One memory a segment, each [G, H, Dh]; m is the scale of c and n (no gradient)."""

    c: Tensor
    n: Tensor
    m: Tensor  # -inf before the first token
    h: Tensor


def empty_state(num_segments: int, heads: int, head_size: int, *, like: Tensor) -> SLSTMState:
    """The state before any token: nothing stored, m = -inf."""
    shape, dtype = (num_segments, heads, head_size), core_dtype(like)
    c, n, h = (like.new_zeros(shape, dtype=dtype) for _ in range(3))
    return SLSTMState(c, n, like.new_full(shape, -torch.inf, dtype=dtype), h)
