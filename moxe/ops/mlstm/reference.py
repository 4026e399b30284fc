"""The mLSTM cell, token by token: the oracle that every other backend is held against.

Legend: N packed tokens, H heads, Dh head size, G segments.

    m_t = max(log f_t + m_{t-1}, i_t)                 log f = log sigmoid(fgate), i = igate, k scaled by 1/sqrt(Dh)
    C_t = e^{log f_t + m_{t-1} - m_t} C_{t-1} + e^{i_t - m_t} k_t v_t^T          n_t likewise with k_t
    h_t = C_t^T q_t / max(|n_t^T q_t|, e^{-m_t})

The stabiliser m is the scale in which C and n are written down: h and C e^m do not depend on it, so no gradient is sent
through it. Precision is that of the inputs, which makes float64 inputs the oracle.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def mlstm_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    cu_seqlens: Tensor,
    c0: Tensor,
    n0: Tensor,
    m0: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h [N, H, Dh] and the final c [G, H, Dh, Dh], n [G, H, Dh], m [G, H]; arguments as in `moxe.ops.mlstm.mlstm`."""
    k = k / math.sqrt(q.shape[-1])
    logf = logsigmoid(fgate)
    h_of_token: list[Tensor] = []
    final: list[tuple[Tensor, Tensor, Tensor]] = []
    bounds = cu_seqlens.tolist()
    for g, (start, end) in enumerate(pairwise(bounds)):
        c, n, m = c0[g], n0[g], m0[g].detach()
        for t in range(start, end):
            m_previous, m = m, torch.maximum(logf[t] + m, igate[t]).detach()
            f = torch.exp(logf[t] + m_previous - m)[:, None]
            i = torch.exp(igate[t] - m)[:, None]
            c = f[..., None] * c + i[..., None] * k[t][:, :, None] * v[t][:, None, :]
            n = f * n + i * k[t]
            numerator = torch.einsum("hkv,hk->hv", c, q[t])
            denominator = torch.einsum("hk,hk->h", n, q[t]).abs()
            h_of_token.append(numerator / torch.maximum(denominator, torch.exp(-m))[:, None])
        final.append((c, n, m))
    h = torch.stack(h_of_token) if h_of_token else q.new_zeros(q.shape)
    if not final:
        return h, c0, n0, m0
    c, n, m = (torch.stack(tensors) for tensors in zip(*final, strict=True))
    return h, c, n, m
