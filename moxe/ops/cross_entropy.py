"""Cross-entropy of a linear head that never holds the logits of all tokens.

Legend: N rows, D hidden size, V vocabulary.

A few rows at a time: logits, their loss, and at once its gradient. So memory beyond the gradients themselves is that of
a few rows of logits, and each of the three products of a head is computed once, as without the splitting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moxe.ops.backend import core_dtype, resolve_backend
from moxe.ops.grouped_matmul import Matrices, grouped_outer_, multiplies_in_cpp, sum_dtype

IGNORED = -100
# Entries of logits that are held at a time: about what a last-level cache holds in float32.
_ENTRIES_AT_ONCE = 1 << 22


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, backend: str = "auto") -> Tensor:
    """sum_n -log softmax(weight hidden_n)[target_n], a 0-d tensor; target -100 adds nothing.

    Arguments as of `linear_cross_entropies`.
    """
    return linear_cross_entropies(hidden, weight, targets, backend=backend)[0]


def linear_cross_entropies(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The sum of `linear_cross_entropy`, and its terms [N], float32 or float64; only the sum has a gradient.

    Args:
        hidden: [N, D]. Under autocast the products run in its dtype; the softmax is float32 at least.
        weight: [V, D].
        targets: [N] whole numbers.
        backend: `auto` or one of `moxe.ops.backend.BACKENDS`.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if not torch.is_grad_enabled():  # inside a Function it would not be seen, and gradients computed for nothing
        hidden, weight = hidden.detach(), weight.detach()
    through_rows = _through_rows_in_cpp if resolve_backend(backend, device) == "cpu" else _through_rows
    in_cpp = multiplies_in_cpp(backend, device, dtype, *weight.shape)
    return _LinearCrossEntropy.apply(hidden, weight, targets.long().contiguous(), dtype, through_rows, in_cpp)


def _through_rows(logits: Tensor, targets: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor]:
    """The rows' losses [R] and the gradient of logits [R, V] (which it may overwrite)."""
    dtype, logits = logits.dtype, logits.to(core_dtype(logits))
    counts = (targets != IGNORED)[:, None]
    target = targets[:, None].masked_fill(~counts, 0)
    log_normaliser = logits.logsumexp(1, keepdim=True)
    losses = ((log_normaliser - logits.gather(1, target)) * counts).squeeze(1)
    if not wants_gradient:
        return losses, logits
    dlogits = logits.sub_(log_normaliser).exp_()
    dlogits.scatter_add_(1, target, torch.full_like(log_normaliser, -1.0)).mul_(counts)
    return losses, dlogits.to(dtype)


def _through_rows_in_cpp(logits: Tensor, targets: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.moxe.softmax_cross_entropy_(logits, targets, wants_gradient), logits


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, through_rows, in_cpp: bool
    ) -> tuple[Tensor, Tensor]:
        needs_dhidden, needs_dweight, *_ = ctx.needs_input_grad
        needs_gradient = needs_dhidden or needs_dweight
        head = Matrices(weight[None], dtype, (0, len(hidden)), in_cpp=in_cpp)
        transposed = dhidden = None
        if needs_dhidden:
            transposed = Matrices(weight[None], dtype, (0, len(hidden)), transposed=True, in_cpp=in_cpp)
            dhidden = torch.zeros_like(hidden)
        dweight = torch.zeros_like(weight[None], dtype=core_dtype(hidden)) if needs_dweight else None
        loss = hidden.new_zeros((), dtype=core_dtype(hidden))
        losses = hidden.new_empty(len(hidden), dtype=loss.dtype)
        rows_at_once = max(1, _ENTRIES_AT_ONCE // len(weight))
        for begin in range(0, len(hidden), rows_at_once):
            rows = slice(begin, begin + rows_at_once)
            x = hidden[rows].to(dtype)
            all_rows = (0, len(x))
            losses[rows], dlogits = through_rows(head.multiply(x, all_rows), targets[rows], needs_gradient)
            loss += losses[rows].sum()
            if dhidden is not None and transposed is not None:
                dhidden[rows] = transposed.multiply(dlogits, all_rows)
            if dweight is not None and dweight.dtype == sum_dtype(dtype, in_cpp):
                grouped_outer_(dlogits, x, all_rows, dweight, add=True, in_cpp=in_cpp)
            elif dweight is not None:
                of_rows = torch.empty_like(dweight, dtype=dtype)
                dweight += grouped_outer_(dlogits, x, all_rows, of_rows, in_cpp=in_cpp)
        ctx.save_for_backward(dhidden, None if dweight is None else dweight[0].to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return loss, losses

    @staticmethod
    def backward(ctx, dloss: Tensor, _: None) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        dhidden, dweight = (grad if grad is None else grad * dloss.to(grad.dtype) for grad in ctx.saved_tensors)
        return dhidden, dweight, None, None, None, None


# Implemented in cross_entropy.cpp; overwrites the logits with their gradient.
torch.library.define(
    "moxe::softmax_cross_entropy_", "(Tensor(a!) logits, Tensor targets, bool wants_gradient) -> Tensor"
)


@torch.library.register_fake("moxe::softmax_cross_entropy_")
def _(logits, targets, wants_gradient):
    return logits.new_empty(logits.shape[0], dtype=core_dtype(logits))
