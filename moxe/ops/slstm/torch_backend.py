"""The sLSTM cell one time step at a time over all live segments, with a hand-written backward pass.

Legend: N packed tokens, H heads, Dh head size, G segments, E groups, L slots of a group (its most segments).

Segments of a group are ordered by length, longest first, and groups by their longest segment. So the segments alive
at a step are, but for a few, a rectangle (first groups) x (first slots), which shrinks as time goes on. Time is laid
out as one such rectangle after another; a rectangle's dead cells repeat the last token of their segment and are never
read back. The backward pass computes everything that does not recur for all steps at once; what recurs is a dozen
operations a step.
Gates, stabilisers and states are float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import logsigmoid

from moxe.ops.backend import core_dtype, without_autocast


@dataclass(frozen=True)
class _Step:
    """The rectangle of one time step: rows begin to end - 1 are [groups * H, slots] in this order."""

    begin: int
    end: int
    groups: int
    slots: int


@dataclass(frozen=True)
class _TimePlan:
    steps: tuple[_Step, ...]
    group_order: Tensor  # [E] groups, longest segment first
    state_row: Tensor  # [G * H] row of each segment's head in the full rectangle [E * H * L]
    num_slots: int  # L
    input_row: Tensor  # [P * H] row of gates [N * H, ...] that each time-major row reads
    output_row: Tensor  # [N * H] time-major row that computes each token's head
    previous_row: Tensor  # [N * H] row before it, in [initial rectangle, time-major rows]
    last_row: Tensor  # [G * H] row behind each segment, in [initial rectangle, time-major rows]


@lru_cache(maxsize=64)
def _plan(cu_seqlens: tuple[int, ...], group_offsets: tuple[int, ...], heads: int, device: torch.device) -> _TimePlan:
    cu = torch.tensor(cu_seqlens)
    length = cu.diff()
    sizes = torch.tensor(group_offsets).diff()
    num_groups, num_slots = len(sizes), int(sizes.max()) if len(sizes) else 0
    group_of_segment = torch.repeat_interleave(torch.arange(num_groups), sizes)

    # segment_at[rank of group, slot]; -1 where a group has fewer segments.
    longest = torch.zeros(num_groups, dtype=torch.int64).scatter_reduce(0, group_of_segment, length, "amax")
    group_order = torch.argsort(longest, descending=True, stable=True)
    segment_at = torch.full((num_groups, num_slots), -1)
    for rank, group in enumerate(group_order.tolist()):
        first, last = group_offsets[group], group_offsets[group + 1]
        by_length = torch.argsort(length[first:last], descending=True, stable=True)
        segment_at[rank, : last - first] = by_length + first
    length_at = torch.where(segment_at >= 0, length[segment_at], 0) if len(length) else segment_at

    head = torch.arange(heads)
    num_steps = int(length.max()) if len(length) else 0
    full = num_groups * heads * num_slots
    rank_at, slot_at = torch.meshgrid(torch.arange(num_groups), torch.arange(num_slots), indexing="ij")
    full_row = (rank_at[..., None] * heads + head) * num_slots + slot_at[..., None]
    exists = segment_at >= 0
    state_row = torch.zeros(len(length), heads, dtype=torch.int64)
    state_row[segment_at[exists]] = full_row[exists]

    output_row = torch.zeros(cu_seqlens[-1], heads, dtype=torch.int64)
    previous_row = torch.zeros_like(output_row)
    last_row = state_row.clone()
    steps, input_rows, begin = [], [], 0
    before = full_row  # row of each (group, head, slot) at the step before
    for t in range(num_steps):
        alive = length_at > t
        groups, slots = int(alive.any(1).sum()), int(alive.any(0).sum())
        segment = segment_at[:groups, :slots].clamp(min=0)
        token = cu[segment] + torch.minimum(torch.tensor(t), (length[segment] - 1).clamp(min=0))
        token = token.clamp(max=cu_seqlens[-1] - 1)
        input_rows.append((token[:, None, :] * heads + head[:, None]).flatten())
        row = begin + (rank_at[:groups, :slots, None] * heads + head) * slots + slot_at[:groups, :slots, None]
        alive = alive[:groups, :slots]
        output_row[token[alive]] = row[alive]
        previous_row[token[alive]] = before[:groups, :slots][alive]
        last_row[segment[alive]] = full + row[alive]
        steps.append(_Step(begin, begin + row.numel(), groups, slots))
        begin, before = begin + row.numel(), full + row
    input_row = torch.cat(input_rows) if input_rows else torch.zeros(0, dtype=torch.int64)
    return _TimePlan(
        tuple(steps),
        group_order.to(device),
        state_row.flatten().to(device),
        num_slots,
        input_row.to(device),
        output_row.flatten().to(device),
        previous_row.flatten().to(device),
        last_row.flatten().to(device),
    )


def _initial_rectangle(plan: _TimePlan, state: Tensor, fill: float, dtype: torch.dtype, num_groups: int) -> Tensor:
    """[G, H, Dh] -> [E * H * L, Dh]; rows of no segment hold `fill`."""
    heads, size = state.shape[1:]
    rectangle = state.new_full((num_groups * heads * plan.num_slots, size), fill, dtype=dtype)
    return rectangle.index_copy_(0, plan.state_row, state.reshape(-1, size).to(dtype))


def _recurrent_matrices(plan: _TimePlan, recurrent: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, H, Dh, 4, Dh] -> [E * H, Dh, 4 Dh] in the order of the plan."""
    ordered = recurrent if len(recurrent) == 1 else recurrent.index_select(0, plan.group_order)
    return ordered.flatten(3).flatten(0, 1).to(dtype)


@torch.library.custom_op("moxe::slstm_torch", mutates_args=())
def slstm_torch(
    gates: Tensor,
    recurrent: Tensor,
    cu_seqlens: Tensor,
    group_offsets: list[int],
    c0: Tensor,
    n0: Tensor,
    m0: Tensor,
    h0: Tensor,
    return_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h [N, H, Dh], the final c, n, m, h (empty unless asked for), and what the backward pass needs, time-major:

    the gates i, f, z, o and sigmoid(-f~) [5, rows, Dh], and c, n, h behind the initial rectangle [3, full + rows, Dh].
    """
    dtype, (_, heads, _, size) = core_dtype(gates), gates.shape
    num_groups = len(group_offsets) - 1
    plan = _plan(tuple(cu_seqlens.tolist()), tuple(group_offsets), heads, gates.device)
    matrices = _recurrent_matrices(plan, recurrent, dtype)
    raw = gates.reshape(-1, 4 * size).index_select(0, plan.input_row).to(dtype)
    full, rows = num_groups * heads * plan.num_slots, len(plan.input_row)
    saved_gates = gates.new_empty(5, rows, size, dtype=dtype)
    saved_states = gates.new_empty(3, full + rows, size, dtype=dtype)
    for buffer, state in zip(saved_states, (c0, n0, h0), strict=True):
        buffer[:full] = _initial_rectangle(plan, state, 0.0, dtype, num_groups)
    m = _initial_rectangle(plan, m0, -torch.inf, dtype, num_groups)
    m_of_step = [m]

    rectangle = (num_groups * heads, plan.num_slots, size)
    c, n, h = (buffer[:full].view(rectangle) for buffer in saved_states)
    m = m.view(rectangle)
    for step in plan.steps:
        shape = (step.groups * heads, step.slots, size)
        live = (slice(0, shape[0]), slice(0, shape[1]))
        raw_now = raw[step.begin : step.end].view(*shape[:2], 4 * size)
        raw_now.baddbmm_(h[live], matrices[: shape[0]])
        igate, fgate, zgate, ogate = raw_now.view(*shape[:2], 4, size).unbind(2)
        i, f, z, o = (buffer[step.begin : step.end].view(shape) for buffer in saved_gates[:4])
        kept = logsigmoid(fgate).add_(m[live])
        m = torch.maximum(kept, igate)
        torch.sub(igate, m, out=i).exp_()
        torch.sub(kept, m, out=f).exp_()
        torch.tanh(zgate, out=z)
        torch.sigmoid(ogate, out=o)
        behind = [buffer[full + step.begin : full + step.end].view(shape) for buffer in saved_states]
        c = torch.mul(f, c[live], out=behind[0]).addcmul_(i, z)
        n = torch.mul(f, n[live], out=behind[1]).add_(i)
        h = torch.mul(o, c, out=behind[2]).div_(n)
        if return_final_state:
            m_of_step.append(m.view(-1, size))
    torch.sigmoid(raw.view(-1, 4, size)[:, 1].neg(), out=saved_gates[4])

    out = saved_states[2, full:].index_select(0, plan.output_row).unflatten(0, (-1, heads)).to(gates.dtype)
    if not return_final_state:
        empty = (gates.new_empty(0, heads, size, dtype=dtype) for _ in range(4))
        return (out, *empty, saved_gates, saved_states)  # type: ignore[return-value]
    c_all, n_all, h_all = saved_states
    final = (
        buffer.index_select(0, plan.last_row).unflatten(0, (-1, heads))
        for buffer in (c_all, n_all, torch.cat(m_of_step), h_all)
    )
    return (out, *final, saved_gates, saved_states)  # type: ignore[return-value]


def _num_rows(cu_seqlens: Tensor, group_offsets: list[int], heads: int) -> int | torch.SymInt:
    """Time-major rows: known from the lengths where they have values (meta tensors), else unknown (torch.compile)."""
    if isinstance(cu_seqlens, FakeTensor):
        return torch.library.get_ctx().new_dynamic_size()
    return len(_plan(tuple(cu_seqlens.tolist()), tuple(group_offsets), heads, cu_seqlens.device).input_row)


@slstm_torch.register_fake
def _(gates, recurrent, cu_seqlens, group_offsets, c0, n0, m0, h0, return_final_state):
    dtype, (tokens, heads, _, size) = core_dtype(gates), gates.shape
    segments = cu_seqlens.shape[0] - 1 if return_final_state else 0
    out = gates.new_empty(tokens, heads, size)
    final = (gates.new_empty(segments, heads, size, dtype=dtype) for _ in range(4))
    rows = _num_rows(cu_seqlens, group_offsets, heads)
    most_segments = max((last - first for first, last in pairwise(group_offsets)), default=0)
    full = len(recurrent) * heads * most_segments
    saved_gates = gates.new_empty(5, rows, size, dtype=dtype)
    saved_states = gates.new_empty(3, full + rows, size, dtype=dtype)
    return (out, *final, saved_gates, saved_states)


@torch.library.custom_op("moxe::slstm_torch_backward", mutates_args=())
def slstm_torch_backward(
    recurrent: Tensor,
    cu_seqlens: Tensor,
    group_offsets: list[int],
    saved_gates: Tensor,
    saved_states: Tensor,
    dh: Tensor | None,
    dc_final: Tensor | None,
    dn_final: Tensor | None,
    dh_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gates [N, H, 4, Dh], of R, and of c0, n0, h0 [G, H, Dh], in the core's dtype."""
    dtype, heads, size = saved_gates.dtype, recurrent.shape[1], recurrent.shape[2]
    num_groups = len(recurrent)
    plan = _plan(tuple(cu_seqlens.tolist()), tuple(group_offsets), heads, recurrent.device)
    matrices = _recurrent_matrices(plan, recurrent, dtype).mT.contiguous()
    rows = saved_gates.shape[1]
    full = saved_states.shape[1] - rows
    i, f, z, o, not_f = saved_gates
    n, h = saved_states[1:, full:]

    # What each step multiplies dc, dn and dh with; c and n of the step before are looked up in the rectangle before.
    dc_from_dh = o / n
    dn_from_dh = (h / n).neg_()
    do_from_dh = h * (1 - o)
    dz_from_dc = i * (1 - z * z)
    di_from_dc = i * z
    df_from_dc, df_from_dn = torch.empty_like(f), torch.empty_like(f)
    slots, groups, begin_before = plan.num_slots, num_groups, 0
    for step in plan.steps:
        shape = (step.groups * heads, step.slots, size)
        before = saved_states[:2, begin_before : begin_before + groups * heads * slots].view(2, -1, slots, size)
        before = before[:, : shape[0], : shape[1]]
        torch.mul(before[0], f[step.begin : step.end].view(shape), out=df_from_dc[step.begin : step.end].view(shape))
        torch.mul(before[1], f[step.begin : step.end].view(shape), out=df_from_dn[step.begin : step.end].view(shape))
        slots, groups, begin_before = step.slots, step.groups, full + step.begin
    df_from_dc *= not_f
    df_from_dn *= not_f

    # Gradients that arrive from outside, laid out in time; those of final states at the last row of their segment.
    dh_all, dc_all, dn_all = (saved_gates.new_zeros(full + rows, size) for _ in range(3))
    if dh is not None:
        dh_all[full:].index_copy_(0, plan.output_row, dh.reshape(-1, size).to(dtype))
    for buffer, final in ((dh_all, dh_final), (dc_all, dc_final), (dn_all, dn_final)):
        if final is not None:
            buffer.index_add_(0, plan.last_row, final.reshape(-1, size).to(dtype))

    draw = saved_gates.new_empty(rows, 4, size)
    dh_next = dc_next = dn_next = None
    for step in reversed(plan.steps):
        here, there = slice(step.begin, step.end), slice(full + step.begin, full + step.end)
        shape = (step.groups * heads, step.slots, size)
        dh_now, dc_now, dn_now = (buffer[there].view(shape) for buffer in (dh_all, dc_all, dn_all))
        if dh_next is not None and dc_next is not None and dn_next is not None:
            live = (slice(0, dh_next.shape[0]), slice(0, dh_next.shape[1]))
            dh_now[live] += dh_next
            dc_now[live] += dc_next
            dn_now[live] += dn_next
        dc_now.addcmul_(dh_now, dc_from_dh[here].view(shape))
        dn_now.addcmul_(dh_now, dn_from_dh[here].view(shape))
        draw_now = draw[here].view(*shape[:2], 4, size)
        i_now = i[here].view(shape)
        torch.mul(dc_now, di_from_dc[here].view(shape), out=draw_now[:, :, 0]).addcmul_(dn_now, i_now)
        torch.mul(dc_now, df_from_dc[here].view(shape), out=draw_now[:, :, 1])
        draw_now[:, :, 1].addcmul_(dn_now, df_from_dn[here].view(shape))
        torch.mul(dc_now, dz_from_dc[here].view(shape), out=draw_now[:, :, 2])
        torch.mul(dh_now, do_from_dh[here].view(shape), out=draw_now[:, :, 3])
        dh_next = torch.bmm(draw_now.view(*shape[:2], 4 * size), matrices[: shape[0]])
        dc_next = dc_now.mul_(f[here].view(shape))
        dn_next = dn_now.mul_(f[here].view(shape))

    dinitial = []
    for buffer, first in ((dc_all, dc_next), (dn_all, dn_next), (dh_all, dh_next)):
        rectangle = buffer[:full].view(num_groups * heads, plan.num_slots, size)
        if first is not None:
            rectangle[: first.shape[0], : first.shape[1]] += first
        dinitial.append(buffer[:full].index_select(0, plan.state_row).unflatten(0, (-1, heads)))
    dgates = draw.view(rows, 4 * size).index_select(0, plan.output_row).unflatten(0, (-1, heads))
    h_before = saved_states[2].index_select(0, plan.previous_row).unflatten(0, (-1, heads))
    drecurrent = torch.zeros(recurrent.shape, dtype=dtype, device=recurrent.device).flatten(3)
    bounds = cu_seqlens[group_offsets].tolist()
    for e, (start, end) in enumerate(pairwise(bounds)):
        torch.bmm(h_before[start:end].permute(1, 2, 0), dgates[start:end].transpose(0, 1), out=drecurrent[e])
    return (dgates.unflatten(2, (4, size)), drecurrent.view(recurrent.shape), *dinitial)  # type: ignore[return-value]


@slstm_torch_backward.register_fake
def _(recurrent, cu_seqlens, group_offsets, saved_gates, saved_states, dh, dc_final, dn_final, dh_final):
    heads, size, dtype = recurrent.shape[1], recurrent.shape[2], saved_gates.dtype
    tokens = dh.shape[0] if dh is not None else torch.library.get_ctx().new_dynamic_size()
    segments = cu_seqlens.shape[0] - 1
    dinitial = (recurrent.new_empty(segments, heads, size, dtype=dtype) for _ in range(3))
    return (
        recurrent.new_empty(tokens, heads, 4, size, dtype=dtype),
        torch.empty_like(recurrent, dtype=dtype),
        *dinitial,
    )


def _setup_context(ctx, inputs, output) -> None:
    gates, recurrent, cu_seqlens, ctx.group_offsets, c0, n0, _, h0, ctx.has_final_state = inputs
    ctx.save_for_backward(recurrent, cu_seqlens, *output[5:])
    ctx.dtypes = [x.dtype for x in (gates, recurrent, c0, n0, h0)]
    ctx.mark_non_differentiable(output[3], *output[5:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dh, dc, dn, dm, dh_final, *of_saved):
    if dh is None and dc is None and dn is None and dh_final is None:
        return (None,) * 9
    recurrent, cu_seqlens, saved_gates, saved_states = ctx.saved_tensors
    if not ctx.has_final_state:
        dc = dn = dh_final = None
    with without_autocast(recurrent.device.type):
        grads = slstm_torch_backward(
            recurrent, cu_seqlens, ctx.group_offsets, saved_gates, saved_states, dh, dc, dn, dh_final
        )
    dgates, drecurrent, dc0, dn0, dh0 = (grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
    return dgates, drecurrent, None, None, dc0, dn0, None, dh0, None


slstm_torch.register_autograd(_backward, setup_context=_setup_context)
