"""What the mLSTM cell reads: q, k, v and the gates, from the convolved branch and the branch itself.

Legend: N rows, E groups (weight sets), C channels in blocks of B, H heads.

    q, k = block-diagonal products of the convolved branch; v one of the branch; [igate, fgate] = [q, k, v] W^T + b

In C++ (`projections.cpp`) each row is read once for all of them, and once for all their gradients: for blocks of 4 or
16 channels that fit into a vector of the processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moxe.ops.backend import apply_function, autocast_dtype, core_dtype, resolve_backend, without_autocast
from moxe.ops.grouped_linear import grouped_block_linear
from moxe.ops.mlstm.gates import check_gates, mlstm_gates

Projections = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def mlstm_projections(
    convolved: Tensor,
    branch: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    row_offsets: Sequence[int],
    *,
    backend: str = "auto",
) -> Projections:
    """q, k, v, each [N, C], in autocast's dtype under one; and igate and fgate, each [N, H], in float32 at least.

    Args:
        convolved, branch: [N, C]; q and k come from the first, v from the second.
        q_weight, k_weight, v_weight: [E, C / B, B, B], inputs before outputs.
        gate_weight: [E, 2 H, 3 C]; rows: igate of each head, then fgate of each head; columns: q, k, v.
        gate_bias: [E, 2 H].
        row_offsets: rows row_offsets[e] to row_offsets[e + 1] - 1 belong to group e.
        backend: `auto` or one of `moxe.ops.backend.BACKENDS`.

    Raises:
        ValueError: for shapes that do not agree or an unknown backend.
    """
    weights = q_weight, k_weight, v_weight
    _check(convolved, branch, weights, row_offsets)
    block = q_weight.shape[-1]
    dtype = core_dtype(convolved)
    alike = convolved.dtype == branch.dtype and core_dtype(gate_weight) == dtype
    if resolve_backend(backend, convolved.device.type) == "cpu" and alike and _fits_in_vector(dtype, block):
        check_gates(convolved, convolved, branch, gate_weight, gate_bias, row_offsets)
        stored = autocast_dtype(convolved)
        parameters = (x.to(dtype) for x in (*weights, gate_weight, gate_bias))
        with without_autocast("cpu"):
            rows = convolved.to(stored), branch.to(stored)
            return apply_function(_MLSTMProjectionsCpu, *rows, *parameters, tuple(row_offsets))
    sources = (convolved, convolved, branch)
    q, k, v = (
        grouped_block_linear(x.unflatten(1, (-1, block)), weight, row_offsets, backend=backend).flatten(1)
        for x, weight in zip(sources, weights, strict=True)
    )
    return q, k, v, *mlstm_gates(q, k, v, gate_weight, gate_bias, row_offsets, backend=backend)


def _check(
    convolved: Tensor, branch: Tensor, weights: tuple[Tensor, Tensor, Tensor], row_offsets: Sequence[int]
) -> None:
    shape = weights[0].shape
    agree = len(shape) == 4 and shape[2] == shape[3] and all(w.shape == shape for w in weights)
    agree = agree and shape[0] == len(row_offsets) - 1 and convolved.ndim == 2 and convolved.shape == branch.shape
    if not agree or convolved.shape[1] != shape[1] * shape[2]:
        raise ValueError(
            f"convolved and branch must be [N, C] and the weights of q, k, v [E, C / B, B, B] with "
            f"E={len(row_offsets) - 1} groups, got "
            f"{tuple(convolved.shape)}, {tuple(branch.shape)}, {', '.join(str(tuple(w.shape)) for w in weights)}"
        )


@torch.compiler.assume_constant_result
def _fits_in_vector(dtype: torch.dtype, block: int) -> bool:
    return _library_fits_in_vector(dtype, block)


@cache
def _library_fits_in_vector(dtype: torch.dtype, block: int) -> bool:
    return torch.ops.moxe.fits_in_vector(dtype, block)


class _MLSTMProjectionsCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, convolved, branch, q_weight, k_weight, v_weight, gate_weight, gate_bias, row_offsets):
        convolved, branch = (x if x.stride(1) == 1 else x.contiguous() for x in (convolved, branch))
        weights = tuple(w.contiguous() for w in (q_weight, k_weight, v_weight, gate_weight))
        outputs = torch.ops.moxe.mlstm_projections(convolved, branch, *weights, gate_bias.contiguous(), row_offsets)
        ctx.save_for_backward(convolved, branch, *outputs[:3], *weights)
        ctx.row_offsets = row_offsets
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        of_outputs = (d.contiguous() for d in gradients)
        return *torch.ops.moxe.mlstm_projections_backward(*of_outputs, *ctx.saved_tensors, ctx.row_offsets), None


torch.library.define("moxe::fits_in_vector", "(ScalarType stored, int block) -> bool")
_WEIGHTS = "Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor gate_weight"
torch.library.define(
    "moxe::mlstm_projections",
    f"(Tensor convolved, Tensor branch, {_WEIGHTS}, Tensor gate_bias, int[] row_offsets) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "moxe::mlstm_projections_backward",
    "(Tensor dq, Tensor dk, Tensor dv, Tensor digate, Tensor dfgate, Tensor convolved, Tensor branch, Tensor q, "
    f"Tensor k, Tensor v, {_WEIGHTS}, int[] row_offsets) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("moxe::mlstm_projections")
def _(convolved, branch, q_weight, k_weight, v_weight, gate_weight, gate_bias, row_offsets):
    gates = (convolved.shape[0], gate_weight.shape[1] // 2)
    rows = (convolved.new_empty(convolved.shape) for _ in range(3))
    return *rows, gate_weight.new_empty(gates), gate_weight.new_empty(gates)


@torch.library.register_fake("moxe::mlstm_projections_backward")
def _(dq, dk, dv, digate, dfgate, convolved, branch, q, k, v, q_weight, k_weight, v_weight, gate_weight, row_offsets):
    weights = (torch.empty_like(w) for w in (q_weight, k_weight, v_weight, gate_weight))
    branches = (x.new_empty(x.shape) for x in (convolved, branch))
    return *branches, *weights, gate_weight.new_empty(gate_weight.shape[:2])
