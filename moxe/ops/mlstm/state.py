"""The memory that the mLSTM cell carries from token to token.

Legend: G segments, H heads, Dh head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moxe.ops.backend import core_dtype


class MLSTMState(NamedTuple):
    """One memory a segment; C e^m and n e^m are the true memory, m is its scale (no gradient)."""

    c: Tensor  # [G, H, Dh, Dh], keys by values
    n: Tensor  # [G, H, Dh]
    m: Tensor  # [G, H]; -inf before the first token


def empty_state(num_segments: int, heads: int, head_size: int, *, like: Tensor) -> MLSTMState:
    """The state before any token: nothing stored, m = -inf."""
    dtype = core_dtype(like)
    return MLSTMState(
        like.new_zeros(num_segments, heads, head_size, head_size, dtype=dtype),
        like.new_zeros(num_segments, heads, head_size, dtype=dtype),
        like.new_full((num_segments, heads), -torch.inf, dtype=dtype),
    )
