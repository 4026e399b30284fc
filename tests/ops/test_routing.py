"""Sorting tokens to their experts and back.

Legend: N packed tokens, D hidden size, E experts, K experts a token, G sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moxe.ops.routing import assign, combine, dispatch
from moxe.ops.segments import Segments
from tests.oracles import experts_by_double_loop
from tests.tolerances import assert_close

EXPERTS = 4


@st.composite
def routed_tokens(draw: st.DrawFn) -> tuple[Tensor, Segments]:
    """Distinct experts [N, K] for the tokens of some sequences; often with experts that nobody chose."""
    lengths = draw(st.lists(st.integers(0, 7), max_size=5))
    k = draw(st.integers(1, 3))
    liked = draw(st.sets(st.integers(0, EXPERTS - 1), min_size=k))
    of_token = st.permutations(sorted(liked)).map(lambda order: order[:k])
    chosen = draw(st.lists(of_token, min_size=sum(lengths), max_size=sum(lengths)))
    return torch.tensor(chosen, dtype=torch.int64).reshape(-1, k), Segments.from_lengths(lengths)


@given(routed=routed_tokens())
def test_rows_are_sorted_by_expert_then_sequence_then_time(routed: tuple[Tensor, Segments]):
    indices, sequences = routed
    k = indices.shape[1]
    assignments = assign(indices, sequences)
    sequence_of_token = sequences.segment_of_token.tolist()
    expected = sorted(
        (int(expert), sequence_of_token[token], token, slot)
        for token, experts in enumerate(indices)
        for slot, expert in enumerate(experts)
    )
    assert assignments.token_of_row.tolist() == [token for _, _, token, _ in expected]
    rows = {(token, slot): row for row, (_, _, token, slot) in enumerate(expected)}
    assert assignments.row_of_slot.tolist() == [rows[divmod(slot, k)] for slot in range(indices.numel())]


@given(routed=routed_tokens())
def test_each_pair_of_expert_and_sequence_with_tokens_is_one_segment(routed: tuple[Tensor, Segments]):
    indices, sequences = routed
    assignments = assign(indices, sequences)
    tokens_of_pair: dict[tuple[int, int], list[int]] = {}
    for token, experts in enumerate(indices.tolist()):
        for expert in experts:
            tokens_of_pair.setdefault((expert, int(sequences.segment_of_token[token])), []).append(token)
    pairs = sorted(tokens_of_pair)
    assert assignments.expert_of_segment.tolist() == [expert for expert, _ in pairs]
    assert assignments.sequence_of_segment.tolist() == [sequence for _, sequence in pairs]
    segments = [slice(*bounds) for bounds in pairwise(assignments.cu_rows.tolist())]
    assert [assignments.token_of_row[rows].tolist() for rows in segments] == [tokens_of_pair[pair] for pair in pairs]


@given(routed=routed_tokens())
def test_without_memory_each_assignment_is_a_segment(routed: tuple[Tensor, Segments]):
    indices, sequences = routed
    assignments = assign(indices, sequences, one_token_segments=True)
    assert assignments.cu_rows.tolist() == list(range(indices.numel() + 1))
    assert assignments.token_of_row.equal(assign(indices, sequences).token_of_row)
    assert assignments.expert_of_segment.equal(indices.flatten().sort(stable=True).values)
    assert assignments.sequence_of_segment.equal(sequences.segment_of_token[assignments.token_of_row])


@given(routed=routed_tokens(), bounds=st.lists(st.integers(0, EXPERTS), min_size=1, max_size=3))
def test_ranges_of_experts_share_the_rows_out(routed: tuple[Tensor, Segments], bounds: list[int]):
    indices, sequences = routed
    assignments = assign(indices, sequences)
    cuts = [0, *sorted(bounds), EXPERTS]
    next_row = 0
    for first, last in pairwise(cuts):
        own = assignments.of_experts(first, last)
        assert own.rows.start == next_row
        next_row = own.rows.stop
        assert own.segments.num_tokens == own.rows.stop - own.rows.start
        assert own.segments.num_groups == last - first
        expert_of_row = own.expert[own.segments.segment_of_token] + first
        experts_of_token = indices[assignments.token_of_row[own.rows]]
        assert bool((experts_of_token == expert_of_row[:, None]).any(1).all())
        group = torch.repeat_interleave(torch.arange(last - first), torch.tensor(own.segments.group_offsets).diff())
        assert own.expert.equal(group)
        sequence_of_row = own.sequence[own.segments.segment_of_token]
        assert sequence_of_row.equal(sequences.segment_of_token[assignments.token_of_row[own.rows]])
    assert next_row == indices.numel()


def one_value_per_expert(tokens: Tensor, indices: Tensor, weights: Tensor, sequences: Segments) -> Tensor:
    """Expert e multiplies by e + 1; through dispatch and combine."""
    assignments = assign(indices, sequences)
    own = assignments.of_experts(0, EXPERTS)
    factor = 1 + own.expert[own.segments.segment_of_token]
    return combine(dispatch(tokens, assignments) * factor[:, None], weights, assignments)


def outputs_and_gradients(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Tensor) -> list[Tensor]:
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = run(x, weights)
    dy = torch.randint(-9, 10, y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, weights], dy)]


def check_against_double_loop(indices: Tensor, sequences: Segments, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(indices), 3, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(indices.shape, generator=generator, dtype=torch.float64).to(dtype)
    actual = outputs_and_gradients(lambda x, w: one_value_per_expert(x, indices, w, sequences), x, weights)
    bounds = sequences.cu_seqlens.tolist()

    def by_double_loop(x: Tensor, weights: Tensor) -> Tensor:
        y = experts_by_double_loop(x, indices, weights, bounds, EXPERTS, lambda e, tokens: (e + 1) * tokens)
        return y + 0 * x * weights.sum()  # no tokens: a gradient of zero, not of None

    expected = outputs_and_gradients(by_double_loop, x.double(), weights.double())
    for name, a, e in zip(("y", "gradient of x", "gradient of weights"), actual, expected, strict=True):
        assert_close(a, e, "routing", name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(routed=routed_tokens())
def test_dispatch_and_combine_equal_the_double_loop(dtype: torch.dtype, routed: tuple[Tensor, Segments]):
    check_against_double_loop(*routed, dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("lengths", [[5, 0, 9], [0, 0], [1]])
def test_no_uninitialised_memory_is_ever_read(lengths: list[int]):
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(sum(lengths), EXPERTS, generator=generator).argsort(1)[:, :2]
    check_against_double_loop(indices, Segments.from_lengths(lengths), torch.float32)


def test_gradients_are_those_of_finite_differences():
    indices, sequences = torch.tensor([[0, 2], [2, 3], [0, 3], [2, 0]]), Segments.from_lengths([3, 1])
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(4, 2, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda x, w: one_value_per_expert(x, indices, w, sequences), leaves)


def test_weights_that_sum_to_one_give_unchanged_tokens_back():
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(9, EXPERTS, generator=generator).argsort(1)[:, :3]
    weights = torch.rand(9, 3, generator=generator, dtype=torch.float64).softmax(1)
    x = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    assignments = assign(indices, Segments.from_lengths([4, 5]))
    assert_close(combine(dispatch(x, assignments), weights, assignments), x, "routing")


def test_sequences_that_cover_other_tokens_are_refused():
    with pytest.raises(ValueError, match="sequences cover 5 tokens but expert_indices has 4"):
        assign(torch.zeros(4, 2, dtype=torch.int64), Segments.from_lengths([2, 3]))
