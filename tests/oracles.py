"""Plain, slow implementations that are right at sight: what the ops are held against.

Legend: T tokens of one sequence, N packed tokens, H heads, Dh head size, G segments, E groups (weight sets),
C channels, I inputs, O outputs, Q blocks, D hidden size, K experts a token.

None of them shares code with moxe. A cell's oracle here treats one segment; `moxe.ops.*.reference` treats all, and is
itself held against these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def conv_by_loop(
    x: Tensor, weight: Tensor, bias: Tensor, bounds: Sequence[int], group_of_segment: Sequence[int], before: Tensor
) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_j weight_j x_{t - (taps - 1) + j}, tap by tap.

    Args:
        x: [N, C]; weight, bias: [E, C, taps], [E, C].
        bounds: G + 1 token numbers; group_of_segment: G numbers.
        before: [G, taps - 1, C], the inputs before each segment, oldest first.

    Returns:
        y [N, C] and the last taps - 1 inputs of each segment [G, taps - 1, C].
    """
    taps = weight.shape[-1]
    y, last_inputs = [], []
    for g, e in enumerate(group_of_segment):
        inputs = [*before[g], *x[bounds[g] : bounds[g + 1]]]
        for t in range(taps - 1, len(inputs)):
            out = bias[e]
            for j in range(taps):
                out = out + weight[e, :, j] * inputs[t - (taps - 1) + j]
            y.append(out)
        last_inputs.append(torch.stack(inputs[len(inputs) - (taps - 1) :]) if taps > 1 else before[g])
    return (
        torch.stack(y) if y else x.clone(),
        torch.stack(last_inputs) if last_inputs else before.clone(),
    )


def grouped_linear_by_loop(x: Tensor, weight: Tensor, row_offsets: Sequence[int]) -> Tensor:
    """Row by row: weight[e] @ x_n for the group e of row n; x [N, I], weight [E, O, I] -> [N, O]."""
    rows = [weight[e] @ x[n] for e in range(len(weight)) for n in range(row_offsets[e], row_offsets[e + 1])]
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1])


def grouped_block_linear_by_loop(x: Tensor, weight: Tensor, row_offsets: Sequence[int]) -> Tensor:
    """Row by row and block by block: x [N, Q, I], weight [E, Q, I, O] -> [N, Q, O]."""
    rows = [
        torch.stack([x[n, b] @ weight[e, b] for b in range(weight.shape[1])])
        for e in range(len(weight))
        for n in range(row_offsets[e], row_offsets[e + 1])
    ]
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1], weight.shape[3])


def mlstm_parallel(q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor) -> Tensor:
    """One segment from an empty memory, without any recurrence and without a stabiliser; [T, H, Dh], gates [T, H].

    h_t = sum_{j<=t} a_tj v_j / max(|sum_{j<=t} a_tj|, 1),   a_tj = (prod_{j<s<=t} f_s) e^{i_j} q_t . k_j / sqrt(Dh)
    """
    rows = []
    for t in range(len(q)):
        numerator, denominator = torch.zeros_like(q[t]), torch.zeros_like(igate[t])
        for j in range(t + 1):
            kept = torch.sigmoid(fgate[j + 1 : t + 1]).prod(0)
            a = kept * torch.exp(igate[j]) * (q[t] * k[j]).sum(-1) / math.sqrt(q.shape[-1])
            numerator = numerator + a[:, None] * v[j]
            denominator = denominator + a
        rows.append(numerator / denominator.abs().clamp(min=1.0)[:, None])
    return torch.stack(rows)


def mlstm_unstabilised(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, memory: Tensor, normaliser: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One segment, C_t = f C_{t-1} + e^i k v^T as it stands: h [T, H, Dh], C [H, Dh, Dh], n [H, Dh]."""
    rows = []
    for t in range(len(q)):
        f, i = torch.sigmoid(fgate[t])[:, None], torch.exp(igate[t])[:, None]
        key = k[t] / math.sqrt(q.shape[-1])
        memory = f[..., None] * memory + i[..., None] * torch.einsum("hk,hv->hkv", key, v[t])
        normaliser = f * normaliser + i * key
        divisor = (normaliser * q[t]).sum(-1).abs().clamp(min=1.0)
        rows.append(torch.einsum("hkv,hk->hv", memory, q[t]) / divisor[:, None])
    return torch.stack(rows), memory, normaliser


def mlstm_with_gradient_through_m(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One segment from an empty memory, stabilised, nothing detached: h [T, H, Dh], and the memory C e^m, n e^m."""
    _, heads, size = q.shape
    c, n = q.new_zeros(heads, size, size), q.new_zeros(heads, size)
    m = igate.new_full((heads,), -torch.inf)
    rows = []
    for t in range(len(q)):
        logf = logsigmoid(fgate[t])
        m_before, m = m, torch.maximum(logf + m, igate[t])
        f, i = torch.exp(logf + m_before - m)[:, None], torch.exp(igate[t] - m)[:, None]
        key = k[t] / math.sqrt(size)
        c = f[..., None] * c + i[..., None] * torch.einsum("hk,hv->hkv", key, v[t])
        n = f * n + i * key
        divisor = torch.maximum((n * q[t]).sum(-1).abs(), torch.exp(-m))
        rows.append(torch.einsum("hkv,hk->hv", c, q[t]) / divisor[:, None])
    return torch.stack(rows), c * torch.exp(m)[:, None, None], n * torch.exp(m)[:, None]


def slstm_unstabilised(
    gates: Tensor, recurrent: Tensor, memory: Tensor, normaliser: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One segment, c_t = f c_{t-1} + e^i tanh(z) as it stands: h [T, H, Dh], c and n [H, Dh].

    gates [T, H, 4, Dh] in the order i, f, z, o; recurrent [H, Dh, 4, Dh].
    """
    rows = []
    for gate in gates:
        i, f, z, o = (gate[:, j] + torch.einsum("hi,hio->ho", h, recurrent[:, :, j]) for j in range(4))
        memory = torch.sigmoid(f) * memory + torch.exp(i) * torch.tanh(z)
        normaliser = torch.sigmoid(f) * normaliser + torch.exp(i)
        h = torch.sigmoid(o) * memory / normaliser
        rows.append(h)
    return torch.stack(rows), memory, normaliser


def slstm_with_gradient_through_m(gates: Tensor, recurrent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One segment from an empty memory, stabilised, nothing detached: h [T, H, Dh], and the memory c e^m, n e^m."""
    c = gates.new_zeros(gates.shape[1], gates.shape[3])
    n, h, m = torch.zeros_like(c), torch.zeros_like(c), torch.full_like(c, -torch.inf)
    rows = []
    for gate in gates:
        i, f, z, o = (gate[:, j] + torch.einsum("hi,hio->ho", h, recurrent[:, :, j]) for j in range(4))
        m_before, m = m, torch.maximum(logsigmoid(f) + m, i)
        kept, new = torch.exp(logsigmoid(f) + m_before - m), torch.exp(i - m)
        c, n = kept * c + new * torch.tanh(z), kept * n + new
        h = torch.sigmoid(o) * c / n
        rows.append(h)
    return torch.stack(rows), c * torch.exp(m), n * torch.exp(m)


def experts_by_double_loop(
    x: Tensor,
    expert_indices: Tensor,
    expert_weights: Tensor,
    bounds: Sequence[int],
    num_experts: int,
    run_expert: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Each expert on each sequence's sub-sequence of the tokens routed to it, one after the other.

    Args:
        x: [N, D]; expert_indices, expert_weights: [N, K]; bounds: the first token of each sequence, and N.
        run_expert: (expert, its tokens [T, D] in order) -> outputs [T, D], from an empty memory.
    """
    y = torch.zeros_like(x)
    for expert in range(num_experts):
        for start, end in pairwise(bounds):
            tokens = [t for t in range(start, end) if expert in expert_indices[t].tolist()]
            if tokens:
                weight = (expert_weights[tokens] * (expert_indices[tokens] == expert)).sum(1)
                y = y.index_add(0, torch.tensor(tokens), weight[:, None] * run_expert(expert, x[tokens]))
    return y


def experts_by_masked_state(
    x: Tensor,
    expert_indices: Tensor,
    expert_weights: Tensor,
    bounds: Sequence[int],
    num_experts: int,
    run_masked_expert: Callable[[int, Tensor, Tensor], Tensor],
) -> Tensor:
    """Each expert on every token of each sequence, its memory touched by the tokens routed to it alone.

    run_masked_expert: (expert, all tokens of a sequence [T, D], routed [T] bool) -> outputs [T, D]; those of other
    tokens count for nothing.
    """
    y = torch.zeros_like(x)
    for expert in range(num_experts):
        weight = (expert_weights * (expert_indices == expert)).sum(1)
        for start, end in pairwise(bounds):
            routed = (expert_indices[start:end] == expert).any(1)
            out = run_masked_expert(expert, x[start:end], routed)
            y = y.index_add(0, torch.arange(start, end), weight[start:end, None] * out)
    return y


def masked_conv(x: Tensor, weight: Tensor, bias: Tensor, routed: Tensor) -> Tensor:
    """One sequence [T, C], taps [C, taps]: the window holds the latest routed inputs, and the current one."""
    taps = weight.shape[-1]
    window = [torch.zeros_like(x[0]) for _ in range(taps - 1)] if len(x) else []
    rows = []
    for t in range(len(x)):
        inputs = [*window, x[t]]
        rows.append(bias + (weight * torch.stack(inputs, 1)).sum(1))
        window = inputs[1:] if routed[t] else window
    return torch.stack(rows) if rows else x.clone()


def masked_mlstm(q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, routed: Tensor) -> Tensor:
    """One sequence, unstabilised: every token reads the memory with itself written; only routed ones leave it so."""
    memory, normaliser = q.new_zeros(*q.shape[1:], q.shape[2]), q.new_zeros(q.shape[1:])
    rows = []
    for t in range(len(q)):
        now = slice(t, t + 1)
        h, *written = mlstm_unstabilised(q[now], k[now], v[now], igate[now], fgate[now], memory, normaliser)
        rows.append(h)
        if routed[t]:
            memory, normaliser = written
    return torch.cat(rows) if rows else q.clone()


def masked_slstm(gates: Tensor, recurrent: Tensor, routed: Tensor) -> Tensor:
    """One sequence, unstabilised: as `masked_mlstm`; the h that feeds back is that of the latest routed token."""
    memory = gates.new_zeros(gates.shape[1], gates.shape[3])
    normaliser, h = torch.zeros_like(memory), torch.zeros_like(memory)
    rows = []
    for t in range(len(gates)):
        out, *written = slstm_unstabilised(gates[t : t + 1], recurrent, memory, normaliser, h)
        rows.append(out)
        if routed[t]:
            memory, normaliser, h = *written, out[0]
    return torch.cat(rows) if rows else gates[:, :, 0].clone()
