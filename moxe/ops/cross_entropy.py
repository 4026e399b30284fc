"""Cross-entropy of a linear head that never holds the logits of all tokens.

Legend: N rows, D hidden size, V vocabulary.

A few rows at a time: logits, their loss, and at once its gradient. So memory beyond the gradients themselves is that of
a few rows of logits, and each of the three products of a head is computed once, as without the splitting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moxe.ops.backend import core_dtype

IGNORED = -100
# Entries of logits that are held at a time: about what a last-level cache holds in float32.
_ENTRIES_AT_ONCE = 1 << 22


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """sum_n -log softmax(weight hidden_n)[target_n], a 0-d tensor; target -100 adds nothing.

    Args:
        hidden: [N, D]. Under autocast the products run in its dtype; the softmax is float32 at least.
        weight: [V, D].
        targets: [N] int64.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if not torch.is_grad_enabled():  # inside a Function it would not be seen, and gradients computed for nothing
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        needs_dhidden, needs_dweight, *_ = ctx.needs_input_grad
        dhidden = torch.zeros_like(hidden) if needs_dhidden else None
        dweight = torch.zeros_like(weight) if needs_dweight else None
        core = core_dtype(hidden)
        loss = hidden.new_zeros((), dtype=core)
        matrix = weight.to(dtype)
        counted = targets != IGNORED
        rows_at_once = max(1, _ENTRIES_AT_ONCE // len(weight))
        for begin in range(0, len(hidden), rows_at_once):
            rows = slice(begin, begin + rows_at_once)
            x, counts = hidden[rows].to(dtype), counted[rows, None]
            target = targets[rows, None].masked_fill(~counts, 0)
            logits = (x @ matrix.T).to(core)
            log_normaliser = logits.logsumexp(1, keepdim=True)
            loss += ((log_normaliser - logits.gather(1, target)) * counts).sum()
            if dhidden is None and dweight is None:
                continue
            dlogits = logits.sub_(log_normaliser).exp_()
            dlogits.scatter_add_(1, target, torch.full_like(log_normaliser, -1.0)).mul_(counts)
            dlogits = dlogits.to(dtype)
            if dhidden is not None:
                dhidden[rows] = (dlogits @ matrix).to(hidden.dtype)
            if dweight is not None:
                dweight += dlogits.T @ x
        ctx.save_for_backward(dhidden, dweight)
        return loss

    @staticmethod
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dhidden, dweight = (grad if grad is None else grad * dloss.to(grad.dtype) for grad in ctx.saved_tensors)
        return dhidden, dweight, None, None
