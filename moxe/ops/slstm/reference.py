"""The sLSTM cell, token by token: the oracle that every other backend is held against.

Legend: N packed tokens, H heads, Dh head size, G segments, E groups (weight sets).

    [i~, f~, z~, o~] = gates_t + R h_{t-1}             gates_t = W x_t + b, computed by the caller
    m_t = max(log sigmoid(f~) + m_{t-1}, i~)           i = e^{i~ - m_t},  f = e^{log sigmoid(f~) + m_{t-1} - m_t}
    c_t = f c_{t-1} + i tanh(z~)    n_t = f n_{t-1} + i    h_t = sigmoid(o~) c_t / n_t

The stabiliser m is the scale in which c and n are written down: h does not depend on it, so no gradient is sent through
it. Precision is that of the inputs, which makes float64 inputs the oracle.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def slstm_reference(
    gates: Tensor,
    recurrent: Tensor,
    cu_seqlens: Tensor,
    group_offsets: list[int],
    c0: Tensor,
    n0: Tensor,
    m0: Tensor,
    h0: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h [N, H, Dh] and the final c, n, m, h [G, H, Dh]; arguments as in `moxe.ops.slstm.slstm`."""
    bounds = cu_seqlens.tolist()
    h_of_token: list[Tensor] = []
    final: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for e, (first, last) in enumerate(pairwise(group_offsets)):
        for g in range(first, last):
            c, n, m, h = c0[g], n0[g], m0[g].detach(), h0[g]
            for t in range(bounds[g], bounds[g + 1]):
                raw = gates[t] + torch.einsum("hi,higo->hgo", h, recurrent[e])
                igate, fgate, zgate, ogate = raw.unbind(1)
                logf = logsigmoid(fgate)
                m_previous, m = m, torch.maximum(logf + m, igate).detach()
                f = torch.exp(logf + m_previous - m)
                i = torch.exp(igate - m)
                c = f * c + i * torch.tanh(zgate)
                n = f * n + i
                h = torch.sigmoid(ogate) * c / n
                h_of_token.append(h)
            final.append((c, n, m, h))
    out = torch.stack(h_of_token) if h_of_token else gates.new_zeros(gates.shape[0], *h0.shape[1:])
    if not final:
        return out, c0, n0, m0, h0
    c, n, m, h = (torch.stack(tensors) for tensors in zip(*final, strict=True))
    return out, c, n, m, h
