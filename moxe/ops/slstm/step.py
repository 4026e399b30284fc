"""One token of a few rows through sLSTM blocks, in place on their state: what decoding does (`step.cpp`).

Legend: N rows, K choices a row, E blocks, D hidden size, H heads, Dh = D / H, T taps, F width of the feed-forward part.

    out_n += sum_k weight_nk f_{e_nk}(x_n)      f as in `moxe.modules.slstm`
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PARAMETERS = (
    "Tensor norm, Tensor conv_weight, Tensor conv_bias, Tensor if_proj, Tensor zo_proj, Tensor recurrent_weight, "
    "Tensor gate_bias, Tensor head_norm, Tensor ffn_norm, Tensor up_proj, Tensor down_proj"
)
torch.library.define(
    "moxe::slstm_step_",
    f"(Tensor x, Tensor experts, Tensor weights, int first, {_PARAMETERS}, float eps, "
    "Tensor(a!) conv, Tensor(b!) c, Tensor(c!) n, Tensor(d!) m, Tensor(e!) h, Tensor(f!) out) -> ()",
)


@torch.library.register_fake("moxe::slstm_step_")
def _(x, experts, weights, first, *parameters_state_and_out):
    return None


def slstm_step(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    first: int,
    parameters: Sequence[Tensor],
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
        parameters: norm [E, D], conv_weight [E, D, T], conv_bias [E, D], if_proj and zo_proj [E, H, Dh, 2 Dh],
            recurrent_weight [E, H, Dh, 4, Dh], gate_bias [E, H, 4, Dh], head_norm [E, D], ffn_norm [E, D], up_proj
            [E, 2 F, D], down_proj [E, D, F]; they are read as they are stored, float64, float32 or bfloat16;
            where they are not stored alike, every token copies them.
        eps: is added to the variances of all three norms.
        state: conv [N, E, T - 1, D] (bfloat16 too) and c, n, m, h [N, E, H, Dh], contiguous; row n belongs to x_n. What
            belongs to a block that a row does not choose stays.
        out: [N, D], stored as x is.

    Raises:
        RuntimeError: for tensors that are not as above.
    """
    cell = state["conv"], state["c"], state["n"], state["m"], state["h"]
    torch.ops.moxe.slstm_step_(x, experts, weights, first, *parameters, eps, *cell, out)
