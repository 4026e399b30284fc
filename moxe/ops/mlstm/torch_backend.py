"""The mLSTM cell in chunks: quadratic inside a chunk, a short scan over the chunks' states; linear in the length.

Legend: N packed tokens, H heads, Dh head size, G segments, J chunks, W tokens of a chunk (padded within a width group).

Each segment is cut into equal chunks from its own start; chunks of like length form a width group, so that a group is
one batched product and little of it is padding. With F_t the sum of log f inside the chunk up to t, and (C_0, n_0, m_0)
the state before the chunk, unrolling the recurrence of `reference.py` gives

    D_tj = F_t - F_j + i_j  (j <= t)        b_t = F_t + m_0        m_t = max(b_t, max_j D_tj)
    S_tj = e^{D_tj - m_t} q_t . k_j         y_t = e^{b_t - m_t}
    h_t  = (sum_j S_tj v_j + y_t C_0^T q_t) / max(|sum_j S_tj + y_t n_0 . q_t|, e^{-m_t})

and the state behind the chunk is y_W C_0 + sum_j e^{D_Wj - m_W} k_j v_j^T. The backward pass recomputes these from the
inputs and adds the gradient of each log-weight where it belongs; the forget gate sums the log-weights of exactly the
pairs it stands between, which stays accurate when the gate is shut (a difference of two cumulative sums does not).
Gates, log-weights, stabilisers and states are float32 at least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from moxe.ops.backend import core_dtype, without_autocast
from moxe.ops.mlstm.state import MLSTMState, empty_state

# A chunk joins the width group of the longest chunk if it fills at least this part of its rows.
_LEAST_FILLED = 0.75


def chunk_length(head_size: int) -> int:
    """Most tokens a chunk may hold: the power of two below the head size, 32 at least.

    Work is about L * Dh a token inside a chunk and Dh^2 a token between chunks; measured in `docs/log.md`.
    """
    return max(32, 1 << max(head_size - 1, 1).bit_length() - 1)


@dataclass(frozen=True)
class _WidthGroup:
    """Chunks that are computed together, padded to one width; a padding slot repeats its chunk's last token."""

    chunk: Tensor | slice  # [Jw] chunk numbers; a slice when the group holds all chunks
    row: Tensor  # [Jw * H * W] rows of the [N * H, ...] inputs, by chunk, head, token
    valid: Tensor  # [Jw, 1, W] bool
    padded: bool
    width: int


@dataclass(frozen=True)
class _ChunkPlan:
    """Chunks ordered by their place in the segment, then by segment (most chunks first).

    So the chunks of place p are scan_offsets[p] to scan_offsets[p + 1] - 1, and their predecessors are a prefix of
    the chunks of place p - 1.
    """

    width_groups: tuple[_WidthGroup, ...]
    scan_offsets: tuple[int, ...]
    first_segment: Tensor  # [chunks of place 0] segment whose first chunk this is
    last_chunk: Tensor  # [non-empty segments] chunk that ends the segment, in the order of first_segment
    num_chunks: int


@lru_cache(maxsize=64)
def _plan(cu_seqlens: tuple[int, ...], num_heads: int, longest: int, device: torch.device) -> _ChunkPlan:
    start = torch.tensor(cu_seqlens[:-1])
    length = torch.tensor(cu_seqlens).diff()
    chunks_of_segment = -(-length // longest)
    order = torch.argsort(chunks_of_segment, descending=True, stable=True)
    order = order[chunks_of_segment[order] > 0]
    places = int(chunks_of_segment.max()) if len(order) else 0
    alive = [int((chunks_of_segment[order] > place).sum()) for place in range(places)]
    scan_offsets = (0, *torch.tensor(alive, dtype=torch.int64).cumsum(0).tolist())

    segment = torch.cat([order[:count] for count in alive]) if places else order
    place = torch.repeat_interleave(torch.arange(places), torch.tensor(alive, dtype=torch.int64))
    count = chunks_of_segment[segment]
    chunk_start = place * length[segment] // count
    chunk_size = (place + 1) * length[segment] // count - chunk_start
    chunk_start = chunk_start + start[segment]

    last_place = chunks_of_segment[order] - 1
    last_chunk = torch.tensor(scan_offsets)[last_place] + torch.arange(len(order))

    width_groups = []
    by_size = torch.argsort(chunk_size, descending=True, stable=True)
    sizes = chunk_size[by_size]
    begin = 0
    while begin < len(by_size):
        width = int(sizes[begin])
        end = begin + int((sizes[begin:] >= _LEAST_FILLED * width).sum())
        chunk = by_size[begin:end].sort().values
        slot = torch.arange(width)
        token = chunk_start[chunk, None] + torch.minimum(slot, chunk_size[chunk, None] - 1)
        row = token[:, None, :] * num_heads + torch.arange(num_heads)[:, None]
        valid = (slot < chunk_size[chunk, None])[:, None, :]
        chosen = slice(None) if len(chunk) == len(by_size) else chunk.to(device)
        width_groups.append(
            _WidthGroup(chosen, row.flatten().to(device), valid.to(device), not bool(valid.all()), width)
        )
        begin = end
    return _ChunkPlan(tuple(width_groups), scan_offsets, order.to(device), last_chunk.to(device), int(scan_offsets[-1]))


class _Chunks:
    """One width group's tensors, [Jw, H, W, ...]; built alike for the forward and the backward pass."""

    def __init__(self, group: _WidthGroup, q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor) -> None:
        self.group = group
        self.heads, self.head_size = q.shape[1:]
        self.q, self.k, self.v = self.gather(q), self.gather(k), self.gather(v)
        self.k *= 1 / math.sqrt(self.head_size)
        self.fgate = self.gather(fgate)
        igate, logf = self.gather(igate), logsigmoid(self.fgate)
        if group.padded:
            igate = igate.masked_fill(~group.valid, -torch.inf)
            logf = logf.masked_fill(~group.valid, 0.0)
        self.cumulative_logf = logf.cumsum(-1)
        source = igate - self.cumulative_logf
        # What each token still weighs, in the log, when the chunk ends (D_Wj).
        self.log_weight_at_end = self.cumulative_logf[..., -1:] + source
        self.source = source

    def gather(self, x: Tensor) -> Tensor:
        """[N, H, ...] -> [Jw, H, W, ...] in the precision of the core."""
        rows = x.flatten(0, 1).index_select(0, self.group.row)
        return rows.to(core_dtype(x)).unflatten(0, (-1, self.heads, self.group.width))

    def scatter(self, out: Tensor, x: Tensor) -> None:
        """Writes the valid slots of x [Jw, H, W, ...] to their rows of out [N, H, ...]."""
        rows, x = self.group.row, x.flatten(0, 2)
        if self.group.padded:
            valid = self.group.valid.expand(-1, self.heads, -1).flatten()
            rows, x = rows[valid], x[valid]
        out.view(-1, *out.shape[2:]).index_copy_(0, rows, x.to(out.dtype))


@dataclass(frozen=True)
class _Attention:
    """What the tokens of a width group read, [Jw, H, W, ...]; see the formulas on top."""

    h: Tensor
    m: Tensor
    weight: Tensor  # e^{D - m}
    score: Tensor  # S
    state_weight: Tensor | None  # y; None when no chunk has a state before it
    denominator: Tensor
    divisor: Tensor


def _attend(part: _Chunks, state: _States | None) -> _Attention:
    logd = part.cumulative_logf[..., :, None] + part.source[..., None, :]
    width = part.group.width
    logd.masked_fill_(torch.ones(width, width, dtype=torch.bool, device=logd.device).triu_(1), -torch.inf)
    m, state_weight = logd.amax(-1), None
    if state is not None:
        b = part.cumulative_logf + state.m[part.group.chunk][..., None]
        m = torch.maximum(m, b)
        state_weight = torch.exp(b - m)
    weight = logd.sub_(m[..., None]).exp_()
    score = (part.q @ part.k.mT).mul_(weight)
    numerator, denominator = score @ part.v, score.sum(-1)
    if state is not None and state_weight is not None:
        c, n = state.c[part.group.chunk], state.n[part.group.chunk]
        numerator += (part.q @ c).mul_(state_weight[..., None])
        denominator += (part.q @ n[..., None]).squeeze(-1) * state_weight
    divisor = torch.maximum(denominator.abs(), torch.exp(-m))
    return _Attention(numerator / divisor[..., None], m, weight, score, state_weight, denominator, divisor)


class _States:
    """States before every chunk, c [J, H, Dh, Dh], n [J, H, Dh], m [J, H]; and behind the last of each segment."""

    def __init__(self, plan: _ChunkPlan, chunks: list[_Chunks], initial: MLSTMState) -> None:
        dtype, (_, heads, size) = core_dtype(initial.c), initial.n.shape
        shape = (plan.num_chunks, heads)
        self.c, self.n, self.m = (
            initial.c.new_empty(*shape, *rest, dtype=dtype) for rest in ((size, size), (size,), ())
        )
        # The contribution of each chunk alone, on its own scale (m_local), and how much the chunk forgets.
        self.c_local, self.n_local = torch.empty_like(self.c), torch.empty_like(self.n)
        self.m_local, self.log_decay = torch.empty_like(self.m), torch.empty_like(self.m)
        for part in chunks:
            chunk = part.group.chunk
            m_local = part.log_weight_at_end.amax(-1)
            weighted_k = part.k * torch.exp(part.log_weight_at_end - m_local[..., None])[..., None]
            self.c_local[chunk] = weighted_k.mT @ part.v
            self.n_local[chunk] = weighted_k.sum(-2)
            self.m_local[chunk] = m_local
            self.log_decay[chunk] = part.cumulative_logf[..., -1]
        first = plan.first_segment
        state = tuple(tensor[first].to(dtype) for tensor in initial)
        for begin, end in pairwise(plan.scan_offsets):
            here = slice(begin, end)
            c, n, m = (tensor[: end - begin] for tensor in state)
            self.c[here], self.n[here], self.m[here] = c, n, m
            state = self._behind(here, c, n, m)
        self._plan = plan

    def _behind(self, chunks: slice | Tensor, c: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m_end = torch.maximum(m + self.log_decay[chunks], self.m_local[chunks])
        kept = torch.exp(m + self.log_decay[chunks] - m_end)
        new = torch.exp(self.m_local[chunks] - m_end)
        c = c * kept[..., None, None] + self.c_local[chunks] * new[..., None, None]
        n = n * kept[..., None] + self.n_local[chunks] * new[..., None]
        return c, n, m_end

    def final(self, initial: MLSTMState) -> MLSTMState:
        """The state behind each segment; an empty segment keeps its initial state."""
        last, segment = self._plan.last_chunk, self._plan.first_segment
        behind = self._behind(last, self.c[last], self.n[last], self.m[last])
        parts = zip(initial, behind, strict=True)
        return MLSTMState(*(before.to(x.dtype).index_copy(0, segment, x) for before, x in parts))


def _build(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, cu_seqlens: Tensor, longest: int
) -> tuple[_ChunkPlan, list[_Chunks]]:
    plan = _plan(tuple(cu_seqlens.tolist()), q.shape[1], longest, q.device)
    return plan, [_Chunks(group, q, k, v, igate, fgate) for group in plan.width_groups]


def _initial_state(
    q: Tensor, cu_seqlens: Tensor, c0: Tensor | None, n0: Tensor | None, m0: Tensor | None
) -> tuple[MLSTMState, bool]:
    """The state before each segment, and whether all of them begin empty."""
    if c0 is None or n0 is None or m0 is None:
        return empty_state(len(cu_seqlens) - 1, *q.shape[1:], like=q), True
    return MLSTMState(c0, n0, m0), False


def _needs_states(plan: _ChunkPlan, fresh: bool) -> bool:
    return plan.num_chunks > 0 and (len(plan.scan_offsets) > 2 or not fresh)


@torch.library.custom_op("moxe::mlstm_torch", mutates_args=())
def mlstm_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    cu_seqlens: Tensor,
    c0: Tensor | None,
    n0: Tensor | None,
    m0: Tensor | None,
    longest_chunk: int,
    return_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h [N, H, Dh] and the final c, n, m of each segment (empty tensors unless asked for)."""
    plan, chunks = _build(q, k, v, igate, fgate, cu_seqlens, longest_chunk)
    initial, fresh = _initial_state(q, cu_seqlens, c0, n0, m0)
    h = torch.empty_like(q, memory_format=torch.contiguous_format)
    needs_states = _needs_states(plan, fresh)
    states = _States(plan, chunks, initial) if needs_states or return_final_state else None
    before = states if needs_states else None
    for part in chunks:
        part.scatter(h, _attend(part, before).h)
    final = states.final(initial) if states is not None and return_final_state else empty_state(0, *q.shape[1:], like=q)
    return h, final.c, final.n, final.m


@mlstm_torch.register_fake
def _(q, k, v, igate, fgate, cu_seqlens, c0, n0, m0, longest_chunk, return_final_state):
    c, n, m = empty_state(cu_seqlens.shape[0] - 1 if return_final_state else 0, *q.shape[1:], like=q)
    return torch.empty_like(q, memory_format=torch.contiguous_format), c, n, m


@torch.library.custom_op("moxe::mlstm_torch_backward", mutates_args=())
def mlstm_torch_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    cu_seqlens: Tensor,
    c0: Tensor | None,
    n0: Tensor | None,
    m0: Tensor | None,
    longest_chunk: int,
    dh: Tensor | None,
    dc_final: Tensor | None,
    dn_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, igate, fgate, c0, n0 (the last two empty when there was no initial state)."""
    plan, chunks = _build(q, k, v, igate, fgate, cu_seqlens, longest_chunk)
    initial, fresh = _initial_state(q, cu_seqlens, c0, n0, m0)
    needs_states = _needs_states(plan, fresh)
    needs_behind = needs_states or dc_final is not None or dn_final is not None
    states = _States(plan, chunks, initial) if needs_behind and plan.num_chunks else None
    before = states if needs_states else None

    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, igate, fgate)]
    if dh is None:
        dh = torch.zeros_like(q)
    dc_before = None if states is None else torch.zeros_like(states.c)
    dn_before = None if states is None else torch.zeros_like(states.n)
    of_state = None
    chunk_grads = [_through_output(part, before, part.gather(dh), dc_before, dn_before) for part in chunks]
    if states is not None and dc_before is not None and dn_before is not None:
        of_state = _through_scan(plan, states, dc_before, dn_before, dc_final, dn_final)
    for part, grad in zip(chunks, chunk_grads, strict=True):
        if states is not None and of_state is not None:
            _through_chunk_state(part, grad, states, *of_state)
        _scatter_gradients(part, grad, *grads)

    if fresh:
        empty = empty_state(0, *q.shape[1:], like=q)
        return (*grads, empty.c, empty.n)  # type: ignore[return-value]
    # The state of an empty segment passes through; a segment's first chunk is also first in the order of chunks.
    dc0 = torch.zeros_like(initial.c) if dc_final is None else dc_final.to(initial.c.dtype, copy=True)
    dn0 = torch.zeros_like(initial.n) if dn_final is None else dn_final.to(initial.n.dtype, copy=True)
    if dc_before is not None and dn_before is not None:
        count = len(plan.first_segment)
        dc0[plan.first_segment] = dc_before[:count].to(dc0.dtype)
        dn0[plan.first_segment] = dn_before[:count].to(dn0.dtype)
    return (*grads, dc0, dn0)  # type: ignore[return-value]


@mlstm_torch_backward.register_fake
def _(q, k, v, igate, fgate, cu_seqlens, c0, n0, m0, longest_chunk, dh, dc_final, dn_final):
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, igate, fgate))
    if c0 is None or n0 is None:
        empty = empty_state(0, *q.shape[1:], like=q)
        return (*grads, empty.c, empty.n)
    return (*grads, torch.empty_like(c0), torch.empty_like(n0))


@dataclass(frozen=True)
class _ChunkGradients:
    """Gradients within a width group, [Jw, H, W, ...], of k already scaled; completed in place."""

    q: Tensor
    k: Tensor
    v: Tensor
    logd: Tensor  # of D, [Jw, H, W, W]
    b: Tensor  # of b


def _through_output(
    part: _Chunks, state: _States | None, dh: Tensor, dc_before: Tensor | None, dn_before: Tensor | None
) -> _ChunkGradients:
    """From dh to q, k, v and every log-weight; writes the gradient of the state before the chunk."""
    if part.group.padded:
        dh = dh.masked_fill(~part.group.valid[..., None], 0.0)
    read = _attend(part, state)
    dnumerator = dh / read.divisor[..., None]
    counts = read.denominator.abs() >= torch.exp(-read.m)
    ddenominator = -(dnumerator * read.h).sum(-1) * read.denominator.sign() * counts
    dv = read.score.mT @ dnumerator
    dscore = (dnumerator @ part.v.mT).add_(ddenominator[..., None])
    dlogd = dscore * read.score
    dproduct = dscore.mul_(read.weight)
    dq, dk = dproduct @ part.k, dproduct.mT @ part.q
    db = torch.zeros_like(read.m)
    if state is not None and read.state_weight is not None and dc_before is not None and dn_before is not None:
        chunk = part.group.chunk
        dq_state = (dnumerator @ state.c[chunk].mT).add_(ddenominator[..., None] * state.n[chunk][..., None, :])
        dq_state *= read.state_weight[..., None]
        db += (dq_state * part.q).sum(-1)
        dq += dq_state
        weighted_q = part.q * read.state_weight[..., None]
        dc_before[chunk] = weighted_q.mT @ dnumerator
        dn_before[chunk] = (weighted_q * ddenominator[..., None]).sum(-2)
    return _ChunkGradients(dq, dk, dv, dlogd, db)


def _through_scan(
    plan: _ChunkPlan,
    states: _States,
    dc_before: Tensor,
    dn_before: Tensor,
    dc_final: Tensor | None,
    dn_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dc, dn [J, ...] of the state behind each chunk and [J, H] of the log of its decay.

    Completes `dc_before` and `dn_before` in place.
    """
    dc, dn = torch.zeros_like(dc_before), torch.zeros_like(dn_before)
    if dc_final is not None:
        dc[plan.last_chunk] = dc_final[plan.first_segment].to(dc.dtype)
    if dn_final is not None:
        dn[plan.last_chunk] = dn_final[plan.first_segment].to(dn.dtype)
    m_end = torch.maximum(states.m + states.log_decay, states.m_local)
    kept = torch.exp(states.m + states.log_decay - m_end)
    offsets = plan.scan_offsets
    for place in range(len(offsets) - 2, -1, -1):
        here = slice(offsets[place], offsets[place + 1])
        if place + 2 < len(offsets):
            count = offsets[place + 2] - offsets[place + 1]
            followed = slice(offsets[place], offsets[place] + count)
            following = slice(offsets[place + 1], offsets[place + 2])
            dc[followed] += dc_before[following]
            dn[followed] += dn_before[following]
        dc_before[here].addcmul_(dc[here], kept[here][..., None, None])
        dn_before[here].addcmul_(dn[here], kept[here][..., None])
    dlog_decay = kept * ((dc * states.c).sum((-1, -2)) + (dn * states.n).sum(-1))
    return dc, dn, dlog_decay


def _through_chunk_state(
    part: _Chunks, grad: _ChunkGradients, states: _States, dc: Tensor, dn: Tensor, dlog_decay: Tensor
) -> None:
    """From the state behind the chunk to its k, v and log-weights."""
    chunk = part.group.chunk
    m_end = torch.maximum(states.m[chunk] + states.log_decay[chunk], states.m_local[chunk])
    weight = torch.exp(part.log_weight_at_end - m_end[..., None])[..., None]
    dk = (part.v @ dc[chunk].mT).add_(dn[chunk][..., None, :]).mul_(weight)
    grad.v.add_((part.k * weight) @ dc[chunk])
    grad.logd[..., -1, :] += (dk * part.k).sum(-1)
    grad.k.add_(dk)
    grad.b[..., -1] += dlog_decay[chunk]


def _scatter_gradients(
    part: _Chunks, grad: _ChunkGradients, dq: Tensor, dk: Tensor, dv: Tensor, digate: Tensor, dfgate: Tensor
) -> None:
    """Log-weights to gates, and everything back to its row."""
    part.scatter(dq, grad.q)
    part.scatter(dk, grad.k.mul_(1 / math.sqrt(part.head_size)))
    part.scatter(dv, grad.v)
    part.scatter(digate, grad.logd.sum(-2))
    # log f_s takes part in D_tj for j < s <= t, and in b_t for s <= t.
    dlogf = grad.b.flip(-1).cumsum(-1).flip(-1)
    pairs_across = grad.logd.cumsum(-1).tril_(-1).sum(-2)
    dlogf[..., 1:] += pairs_across[..., :-1]
    part.scatter(dfgate, dlogf * torch.sigmoid(-part.fgate))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.longest_chunk, return_final_state = inputs
    ctx.final_is_empty = not return_final_state
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx, dh, dc, dn, dm):
    tensors = ctx.saved_tensors
    if dh is None and dc is None and dn is None:
        return (None,) * 11
    if ctx.final_is_empty:
        dc, dn = None, None
    with without_autocast(tensors[0].device.type):
        *grads, dc0, dn0 = mlstm_torch_backward(*tensors, ctx.longest_chunk, dh, dc, dn)
    if tensors[6] is None:
        dc0, dn0 = None, None
    return (*grads, None, dc0, dn0, None, None, None)


mlstm_torch.register_autograd(_backward, setup_context=_setup_context)
