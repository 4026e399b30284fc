"""Sorting tokens to their experts and back.

Legend: N packed tokens, D hidden size, E experts, K experts a token, G sequences.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moxe.ops.routing import Assignments, assign, combine, dispatch
from moxe.ops.segments import Segments
from tests.oracles import experts_by_double_loop
from tests.tolerances import assert_close

EXPERTS = 4
WIDTH = 21  # fills a vector and a part of one

both_backends = pytest.mark.parametrize("backend", ["torch", "cpu"])
on_cpu = pytest.mark.parametrize("backend", ["cpu"])


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


def one_value_per_expert(
    tokens: Tensor, indices: Tensor, weights: Tensor, sequences: Segments, *, backend: str
) -> Tensor:
    """Expert e multiplies by e + 1; through dispatch and combine."""
    assignments = assign(indices, sequences)
    own = assignments.of_experts(0, EXPERTS)
    factor = 1 + own.expert[own.segments.segment_of_token]
    rows = dispatch(tokens, assignments, backend=backend) * factor[:, None]
    return combine(rows, weights, assignments, backend=backend)


def outputs_and_gradients(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Tensor) -> list[Tensor]:
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = run(x, weights)
    dy = torch.randint(-9, 10, y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, weights], dy)]


def check_against_double_loop(indices: Tensor, sequences: Segments, dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(indices), WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(indices.shape, generator=generator, dtype=torch.float64).to(dtype)
    actual = outputs_and_gradients(
        lambda x, w: one_value_per_expert(x, indices, w, sequences, backend=backend), x, weights
    )
    bounds = sequences.cu_seqlens.tolist()

    def by_double_loop(x: Tensor, weights: Tensor) -> Tensor:
        y = experts_by_double_loop(x, indices, weights, bounds, EXPERTS, lambda e, tokens: (e + 1) * tokens)
        return y + 0 * x * weights.sum()  # no tokens: a gradient of zero, not of None

    expected = outputs_and_gradients(by_double_loop, x.double(), weights.double())
    for name, a, e in zip(("y", "gradient of x", "gradient of weights"), actual, expected, strict=True):
        assert_close(a, e, "routing", name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@both_backends
@given(routed=routed_tokens())
def test_dispatch_and_combine_equal_the_double_loop(backend: str, dtype: torch.dtype, routed: tuple[Tensor, Segments]):
    check_against_double_loop(*routed, dtype, backend)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("lengths", [[5, 0, 9], [0, 0], [1]])
@both_backends
def test_no_uninitialised_memory_is_ever_read(backend: str, lengths: list[int]):
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(sum(lengths), EXPERTS, generator=generator).argsort(1)[:, :2]
    check_against_double_loop(indices, Segments.from_lengths(lengths), torch.float32, backend)


@both_backends
def test_gradients_are_those_of_finite_differences(backend: str):
    indices, sequences = torch.tensor([[0, 2], [2, 3], [0, 3], [2, 0]]), Segments.from_lengths([3, 1])
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(4, 2, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    run = partial(one_value_per_expert, indices=indices, sequences=sequences, backend=backend)
    assert torch.autograd.gradcheck(lambda x, w: run(x, weights=w), leaves)


@both_backends
def test_weights_that_sum_to_one_give_unchanged_tokens_back(backend: str):
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(9, EXPERTS, generator=generator).argsort(1)[:, :3]
    weights = torch.rand(9, 3, generator=generator, dtype=torch.float64).softmax(1)
    x = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    assignments = assign(indices, Segments.from_lengths([4, 5]))
    rows = dispatch(x, assignments, backend=backend)
    assert_close(combine(rows, weights, assignments, backend=backend), x, "routing")


def draw_combination(dtype: torch.dtype, tokens: int = 70) -> tuple[Assignments, list[Tensor]]:
    """y [N K, D] and residual [N, D] of a dtype, weights [N, K] of float32 at least."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :2]
    shapes = {
        (2 * tokens, WIDTH): dtype,
        (tokens, 2): torch.promote_types(dtype, torch.float32),
        (tokens, WIDTH): dtype,
    }
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape, dtype in shapes.items()
    ]
    return assign(indices, Segments.from_lengths([tokens])), leaves


def combine_by_token(y: Tensor, weights: Tensor, residual: Tensor, assignments: Assignments) -> Tensor:
    rows = assignments.row_of_slot.unflatten(0, weights.shape).tolist()
    tokens = [
        own + sum(weight * y[row] for weight, row in zip(of_token, where, strict=True))
        for own, of_token, where in zip(residual, weights, rows, strict=True)
    ]
    return torch.stack(tokens)


def check_combine(dtype: torch.dtype, with_residual: bool, backend: str) -> None:
    assignments, leaves = draw_combination(dtype)
    given_leaves = leaves if with_residual else leaves[:2]
    y = combine(*given_leaves[:2], assignments, residual=leaves[2] if with_residual else None, backend=backend)
    assert y.dtype == dtype
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    base = doubles[2] if with_residual else torch.zeros_like(doubles[2])
    expected = combine_by_token(doubles[0], doubles[1], base, assignments)
    dy = torch.randint(-9, 10, y.shape, generator=torch.Generator().manual_seed(1))
    actual_gradients = torch.autograd.grad(y, given_leaves, dy.to(y.dtype))
    expected_gradients = torch.autograd.grad(expected, doubles[: len(given_leaves)], dy.double())
    assert_close(y, expected, "routing", "y")
    for name, a, e in zip(("y", "weights", "residual"), actual_gradients, expected_gradients, strict=False):
        assert_close(a, e, "routing", f"gradient of {name}")


@pytest.mark.parametrize("with_residual", [False, True], ids=["no residual", "residual"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@both_backends
def test_combine_and_its_gradients_are_those_of_a_loop_over_tokens(
    backend: str, dtype: torch.dtype, with_residual: bool
):
    check_combine(dtype, with_residual, backend)


@pytest.mark.parametrize("with_residual", [False, True], ids=["no residual", "residual"])
@on_cpu
def test_combine_of_bfloat16_is_computed_in_float32_and_rounded_once(backend: str, with_residual: bool):
    check_combine(torch.bfloat16, with_residual, backend)


@both_backends
def test_the_gradient_of_dispatch_sums_a_tokens_rows(backend: str):
    assignments, _ = draw_combination(torch.float64)
    x = torch.zeros(70, WIDTH, dtype=torch.float64, requires_grad=True)
    drows = torch.randn(140, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (dx,) = torch.autograd.grad(dispatch(x, assignments, backend=backend), x, drows)
    assert_close(dx, torch.zeros_like(dx).index_add(0, assignments.token_of_row, drows), "routing")


@both_backends
def test_rows_may_lie_apart_and_gradients_be_expanded(backend: str):
    assignments, (y, weights, residual) = draw_combination(torch.float64)
    strided = [torch.cat([leaf, leaf], 1).chunk(2, dim=1)[1] for leaf in (y, weights, residual)]
    out = combine(*strided[:2], assignments, residual=strided[2], backend=backend)
    dense = combine(y, weights, assignments, residual=residual, backend=backend)
    assert out.equal(dense)
    leaves = [y, weights, residual]
    expected = torch.autograd.grad(dense, leaves, torch.ones_like(dense))
    for actual, right in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        assert_close(actual, right, "routing")
    x = residual.detach().requires_grad_()
    (dx,) = torch.autograd.grad(dispatch(x, assignments, backend=backend).sum(), x)
    assert dx.equal(torch.full_like(x, 2))


@both_backends
def test_a_nan_stays_with_its_token(backend: str):
    assignments, (y, weights, _) = draw_combination(torch.float32)
    sound = combine(y, weights, assignments, backend=backend)
    with torch.no_grad():
        y[assignments.row_of_slot[7], WIDTH - 1] = torch.nan  # slot 7: the second assignment of token 3
    actual = combine(y, weights, assignments, backend=backend)
    assert actual.isnan().nonzero().tolist() == [[3, WIDTH - 1]]
    others = torch.arange(len(actual)) != 3
    assert actual[others].equal(sound[others])


@on_cpu
def test_the_number_of_threads_changes_no_bit(backend: str):
    assignments, leaves = draw_combination(torch.float32)

    def run() -> list[Tensor]:
        y = combine(*leaves[:2], assignments, residual=leaves[2], backend=backend)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    alone = run()
    torch.set_num_threads(2)
    try:
        shared = run()
    finally:
        torch.set_num_threads(1)
    assert all(a.equal(b) for a, b in zip(alone, shared, strict=True))


@both_backends
def test_autocast_sums_in_its_dtype_and_keeps_that_of_the_residual(backend: str):
    assignments, (y, weights, residual) = draw_combination(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        alone = combine(y, weights, assignments, backend=backend)
        on_top = combine(y, weights, assignments, residual=residual, backend=backend)
        of_bfloat16 = combine(y.bfloat16(), weights, assignments, residual=residual, backend=backend)
    assert (alone.dtype, on_top.dtype, of_bfloat16.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    (dweights,) = torch.autograd.grad(of_bfloat16.sum(), weights)
    assert dweights.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_cpu
def test_the_raw_ops_have_true_schemas_and_shapes(backend: str, dtype: torch.dtype):
    only = ("test_schema", "test_faketensor")
    assignments, leaves = draw_combination(dtype)
    y, weights, residual = (leaf.detach() for leaf in leaves)
    forward = (y, weights, residual, assignments.row_of_slot, 2, dtype)
    torch.library.opcheck(torch.ops.moxe.combine, forward, test_utils=only)
    without_either = (y, None, None, assignments.row_of_slot, 2, torch.bfloat16)
    torch.library.opcheck(torch.ops.moxe.combine, without_either, test_utils=only)
    backward = (residual, y, weights, assignments.row_of_slot)
    torch.library.opcheck(torch.ops.moxe.combine_backward, backward, test_utils=only)


# torch.compile itself does what this warning is about when it follows an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@both_backends
def test_a_compiled_function_gives_the_same(backend: str):
    assignments, (_, weights, x) = draw_combination(torch.float64)

    def loss(x: Tensor, weights: Tensor) -> Tensor:
        rows = dispatch(x, assignments, backend=backend).square()
        return combine(rows, weights, assignments, residual=x, backend=backend).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, weights)
    eager = loss(x, weights)
    assert_close(compiled, eager, "routing", "loss")
    gradients = (torch.autograd.grad(of, [x, weights]) for of in (compiled, eager))
    for actual, expected in zip(*gradients, strict=True):
        assert_close(actual, expected, "routing", "gradient")


@pytest.mark.parametrize(
    ("y_shape", "weights_shape", "residual_shape"),
    [((7, 3), (4, 2), None), ((8, 3), (4, 1), None), ((8, 3), (4, 2), (8, 3)), ((8, 3), (4, 2), (4, 2))],
    ids=str,
)
def test_shapes_that_do_not_agree_are_refused_with_the_sizes(
    y_shape: tuple[int, ...], weights_shape: tuple[int, ...], residual_shape: tuple[int, ...] | None
):
    assignments = assign(torch.tensor([[0, 1]] * 4), Segments.from_lengths([4]))
    residual = None if residual_shape is None else torch.zeros(residual_shape)
    with pytest.raises(ValueError, match=re.escape(f"got {y_shape}, {weights_shape}, {residual_shape}")):
        combine(torch.zeros(y_shape), torch.zeros(weights_shape), assignments, residual=residual)


def test_sequences_that_cover_other_tokens_are_refused():
    with pytest.raises(ValueError, match="sequences cover 5 tokens but expert_indices has 4"):
        assign(torch.zeros(4, 2, dtype=torch.int64), Segments.from_lengths([2, 3]))
