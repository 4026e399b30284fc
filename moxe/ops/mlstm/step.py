"""One token of a few rows through mLSTM blocks, in place on their state: what decoding does (`step.cpp`).

Legend: N rows, K choices a row, E blocks, D hidden size, I inner size, H heads, Dh = I / H, Q diagonal blocks, T taps.

    out_n += sum_k weight_nk f_{e_nk}(x_n)      f as in `moxe.modules.mlstm`
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PARAMETERS = (
    "Tensor norm, Tensor up_proj, Tensor conv_weight, Tensor conv_bias, Tensor q_proj, Tensor k_proj, Tensor v_proj, "
    "Tensor gate_weight, Tensor gate_bias, Tensor head_norm, Tensor skip, Tensor down_proj"
)
torch.library.define(
    "moxe::mlstm_step_",
    f"(Tensor x, Tensor experts, Tensor weights, int first, {_PARAMETERS}, int heads, float eps, "
    "Tensor(a!) conv, Tensor(b!) c, Tensor(c!) n, Tensor(d!) m, Tensor(e!) out) -> ()",
)


@torch.library.register_fake("moxe::mlstm_step_")
def _(x, experts, weights, first, *parameters_state_and_out):
    return None


def mlstm_step(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    first: int,
    parameters: Sequence[Tensor],
    heads: int,
    eps: float,
    state: dict[str, Tensor],
    out: Tensor,
) -> None:
    """Adds the blocks' weighted outputs to `out`; `state` becomes that behind the token.

    Without gradients, and by the library of C++ alone (`moxe.ops.cpu.build`).

    Args:
        x: [N, D], N few, float32, or float64 if and only if the parameters are.
        experts: [N, K] int64, the block of each choice; a row's choices differ.
        weights: [N, K].
        first: number of the first of these blocks; choices outside [first, first + E) are left alone.
        parameters: norm [E, D], up_proj [E, 2 I, D], conv_weight [E, I, T], conv_bias [E, I], q_proj, k_proj and v_proj
            [E, Q, I / Q, I / Q], gate_weight [E, 2 H, 3 I], gate_bias [E, 2 H], head_norm [E, I], skip [E, I],
            down_proj [E, D, I]; they are read as they are stored, float64, float32 or bfloat16;
            where they are not stored alike, every token copies them.
        heads: H.
        eps: is added to the variances of both norms.
        state: conv [N, E, T - 1, I] (bfloat16 too), c [N, E, H, Dh, Dh], n [N, E, H, Dh] and m [N, E, H], contiguous;
            row n belongs to x_n. What belongs to a block that a row does not choose stays.
        out: [N, D], stored as x is.

    Raises:
        RuntimeError: for tensors that are not as above.
    """
    cell = state["conv"], state["c"], state["n"], state["m"]
    torch.ops.moxe.mlstm_step_(x, experts, weights, first, *parameters, heads, eps, *cell, out)
