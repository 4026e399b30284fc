"""What both cells promise in every implementation: the oracle's results, and that segments are worlds of their own.

Legend: N packed tokens, G segments.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moxe.ops.mlstm import torch_backend as mlstm_backend
from moxe.ops.segments import Segments
from moxe.ops.slstm import torch_backend as slstm_backend
from tests.ops.cells import (
    GATES,
    IMPLEMENTATIONS,
    MLSTM,
    SLSTM,
    Cell,
    Inputs,
    Run,
    gradients,
    results,
    true_memory,
    with_initial_state,
)
from tests.ops.layouts import LAYOUTS, segments_of
from tests.tolerances import assert_close

DTYPES = [torch.float64, torch.float32]

every_implementation = pytest.mark.parametrize(
    ("cell", "implementation"), IMPLEMENTATIONS, ids=[f"{cell.name}-{name}" for cell, name in IMPLEMENTATIONS]
)
every_fast_implementation = pytest.mark.parametrize(
    ("cell", "implementation"),
    [(cell, name) for cell, name in IMPLEMENTATIONS if name != "reference"],
    ids=[f"{cell.name}-{name}" for cell, name in IMPLEMENTATIONS if name != "reference"],
)


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], cell: Cell) -> None:
    assert actual.keys() == expected.keys()
    # The gradients of q and k cancel to exactly 0 where h does not depend on them (one token, for instance).
    largest_gradient = max(float(x.abs().max()) if x.numel() else 0.0 for n, x in expected.items() if "gradient" in n)
    for name, value in expected.items():
        assert_close(actual[name], value, cell.name, name, largest_term=largest_gradient if "gradient" in name else 0.0)


@lru_cache(maxsize=2)
def inputs_and_oracle(
    cell_name: str,
    lengths: tuple[int, ...],
    group_offsets: tuple[int, ...],
    dtype: torch.dtype,
    gates: str,
    with_state: bool,
) -> tuple[Inputs, dict[str, Tensor]]:
    cell = {"mlstm": MLSTM, "slstm": SLSTM}[cell_name]
    segments = Segments.from_lengths(lengths, group_offsets)
    inputs = cell.make_inputs(segments, dtype, gates=gates, with_state=with_state)
    return inputs, cell.oracle(inputs, segments)


def check_against_oracle(
    cell: Cell, implementation: str, segments: Segments, dtype: torch.dtype, gates: str, with_state: bool
) -> None:
    lengths = tuple(segments.lengths.tolist())
    inputs, expected = inputs_and_oracle(cell.name, lengths, segments.group_offsets, dtype, gates, with_state)
    actual = results(cell.implementations[implementation], inputs, segments)
    assert_all_close(actual, expected, cell)
    core_dtype = torch.promote_types(dtype, torch.float32)
    assert actual["h"].dtype == dtype
    assert actual["final c"].dtype == actual["final n"].dtype == actual["final m"].dtype == core_dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_state", [False, True], ids=["empty memory", "initial state"])
@pytest.mark.parametrize("layout", LAYOUTS)
@every_implementation
def test_outputs_final_states_and_gradients_match_the_oracle(
    cell: Cell, implementation: str, layout: str, with_state: bool, dtype: torch.dtype
):
    check_against_oracle(cell, implementation, segments_of(layout), dtype, "ordinary", with_state)


@every_implementation
def test_bfloat16_tokens_are_computed_in_float32(cell: Cell, implementation: str):
    check_against_oracle(cell, implementation, segments_of("three groups"), torch.bfloat16, "ordinary", with_state=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gates", [gates for gates in GATES if gates != "ordinary"])
@every_implementation
def test_extreme_gates_match_the_oracle(cell: Cell, implementation: str, gates: str, dtype: torch.dtype):
    check_against_oracle(cell, implementation, Segments.from_lengths([37, 5, 1, 11]), dtype, gates, with_state=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_implementation
def test_long_segments_match_the_oracle(cell: Cell, implementation: str, dtype: torch.dtype):
    check_against_oracle(cell, implementation, Segments.from_lengths([97, 64, 33]), dtype, "ordinary", with_state=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_implementation
def test_many_segments_of_unequal_length_match_the_oracle(cell: Cell, implementation: str, dtype: torch.dtype):
    lengths = torch.randint(0, 9, (48,), generator=torch.Generator().manual_seed(0))
    segments = Segments.from_lengths(lengths, (0, 20, 21, 48))
    check_against_oracle(cell, implementation, segments, dtype, "ordinary", with_state=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@every_fast_implementation
@pytest.mark.usefixtures("poisoned_memory")
def test_no_uninitialised_memory_is_ever_read(cell: Cell, implementation: str, layout: str):
    for backend in (mlstm_backend, slstm_backend):
        backend._plan.cache_clear()  # plans are made of fresh memory too
    check_against_oracle(cell, implementation, segments_of(layout), torch.float32, "ordinary", with_state=True)


@st.composite
def segments_in_groups(draw: st.DrawFn) -> Segments:
    lengths = draw(st.lists(st.integers(0, 12), max_size=7))
    cuts = draw(st.lists(st.integers(0, len(lengths)), max_size=3))
    return Segments.from_lengths(lengths, (0, *sorted(cuts), len(lengths)))


@every_fast_implementation
@given(segments=segments_in_groups(), with_state=st.booleans(), gates=st.sampled_from(sorted(GATES)))
def test_random_segments_match_the_oracle(
    cell: Cell, implementation: str, segments: Segments, with_state: bool, gates: str
):
    check_against_oracle(cell, implementation, segments, torch.float64, gates, with_state)


@pytest.mark.parametrize("gates", ["forget gate shut", "forget gate now open, now shut"])
@every_implementation
def test_the_gradient_of_a_shut_forget_gate_is_no_noise(cell: Cell, implementation: str, gates: str):
    """At -20 it is a billionth of the other gradients, and still right to float32's precision."""
    segments = Segments.from_lengths([37, 5, 11])
    inputs = cell.make_inputs(segments, torch.float32, gates=gates)
    actual = results(cell.implementations[implementation], inputs, segments)
    expected = cell.oracle(inputs, segments)

    def of_shut_forget_gates(found: dict[str, Tensor]) -> Tensor:
        if cell is MLSTM:
            return found["gradient of fgate"][inputs["fgate"] < -15]
        return found["gradient of gates"][:, :, 1][inputs["gates"][:, :, 1] < -15]

    assert 0 < of_shut_forget_gates(expected).abs().max() < 1e-5
    assert_close(of_shut_forget_gates(actual), of_shut_forget_gates(expected), cell.name, "gradient of shut gates")


def of_segment(inputs: Inputs, segments: Segments, g: int, cell: Cell) -> tuple[Inputs, Segments]:
    """One segment alone, with the weights of its group."""
    group = next(e for e, last in enumerate(segments.group_offsets[1:]) if g < last)
    tokens = slice(*segments.cu_seqlens[g : g + 2].tolist())
    alone = {name: inputs[name][tokens] for name in cell.token_inputs}
    alone |= {name: inputs[name][group : group + 1] for name in cell.weights}
    alone |= {name: inputs[name][g : g + 1] for name in cell.state_inputs if name in inputs}
    return alone, Segments.from_lengths([tokens.stop - tokens.start])


@every_implementation
def test_packed_equals_separate(cell: Cell, implementation: str):
    segments = Segments.from_lengths([4, 9, 0, 1, 33, 3], (0, 2, 2, 3, 6))
    run = cell.implementations[implementation]
    inputs = cell.make_inputs(segments, torch.float64, with_state=True)

    def separately(leaves: Inputs, segments: Segments):
        parts = [run(*of_segment(leaves, segments, g, cell)) for g in range(segments.num_segments)]
        states = zip(*(state for _, state in parts), strict=True)
        return torch.cat([h for h, _ in parts]), cell.state_type(*(torch.cat(x) for x in states))

    assert_all_close(results(run, inputs, segments), results(separately, inputs, segments), cell)


def resumed(run: Run, cell: Cell, lengths_of_parts: list[list[int]]) -> Run:
    """Runs the tokens of every segment in parts, each from the state that the part before left."""

    def run_in_parts(leaves: Inputs, segments: Segments):
        h = None
        begin = torch.zeros(segments.num_segments, dtype=torch.int64)
        state = cell.initial_state(leaves)
        for lengths in lengths_of_parts:
            end = begin + torch.tensor(lengths)
            place, segment = segments.position_of_token, segments.segment_of_token
            tokens = ((place >= begin[segment]) & (place < end[segment])).nonzero().flatten()
            part = {name: leaves[name][tokens] for name in cell.token_inputs}
            part |= {name: leaves[name] for name in cell.weights}
            if state is not None:
                part = with_initial_state(part, state)
            out, state = run(part, Segments.from_lengths(lengths, segments.group_offsets))
            h = out.new_zeros(segments.num_tokens, *out.shape[1:]) if h is None else h
            h = h.index_copy(0, tokens, out)
            begin = end
        assert begin.equal(segments.lengths)
        assert h is not None
        assert state is not None
        return h, state

    return run_in_parts


PARTS = {
    "in two": [[2, 0, 7, 0, 1], [3, 0, 30, 0, 0]],
    "in three, some parts empty": [[0, 0, 20, 0, 0], [5, 0, 0, 0, 1], [0, 0, 17, 0, 0]],
    "token by token": [[int(t < length) for length in (5, 0, 37, 0, 1)] for t in range(37)],
}


@pytest.mark.parametrize("with_state", [False, True], ids=["empty memory", "initial state"])
@pytest.mark.parametrize("parts", PARTS)
@every_implementation
def test_split_and_resume_equals_whole(cell: Cell, implementation: str, parts: str, with_state: bool):
    """Outputs, the memory at the end whatever its scale, and the gradients that flow back through the memory."""
    lengths = [sum(of_parts) for of_parts in zip(*PARTS[parts], strict=True)]
    segments = Segments.from_lengths(lengths, (0, 2, 5))
    run = cell.implementations[implementation]
    inputs = cell.make_inputs(segments, torch.float64, with_state=with_state)
    in_parts = resumed(run, cell, PARTS[parts])
    whole, resumed_results = (results(r, inputs, segments, outputs_of=true_memory) for r in (run, in_parts))
    for name in [name for name in whole if not name.startswith("final")]:
        assert_close(resumed_results[name], whole[name], cell.name, name)
    for actual, expected in zip(
        true_memory(in_parts(inputs, segments)[1]), true_memory(run(inputs, segments)[1]), strict=True
    ):
        assert_close(actual, expected, cell.name, "memory")


@every_implementation
def test_changing_a_token_changes_no_output_before_it(cell: Cell, implementation: str):
    segments = Segments.from_lengths([37, 6])
    run = cell.implementations[implementation]
    inputs = cell.make_inputs(segments, torch.float32)
    h, _ = run(inputs, segments)
    for t in (0, 1, 6, 31, 32, 36):
        changed = {name: inputs[name].clone() for name in inputs}
        for name in cell.token_inputs:
            changed[name][t] = 10 - 3 * changed[name][t]
        h_changed, _ = run(changed, segments)
        assert h_changed[:t].equal(h[:t])
        assert h_changed[37:].equal(h[37:])
        assert not h_changed[t].isclose(h[t]).any()


@every_implementation
def test_batch_mates_never_matter_not_even_when_they_are_nan(cell: Cell, implementation: str):
    segments = Segments.from_lengths([6, 23, 0, 9], (0, 1, 4))
    run = cell.implementations[implementation]
    inputs = cell.make_inputs(segments, torch.float64, with_state=True)
    tokens = segments.segment_of_token == 1
    spoiled = {name: x.clone() for name, x in inputs.items()}
    for name in cell.token_inputs:
        spoiled[name][~tokens] = torch.nan
    for name in cell.state_inputs:
        spoiled[name][[0, 2, 3]] = torch.nan

    def of_the_segment(inputs: Inputs) -> dict[str, Tensor]:
        leaves = {name: x.clone().requires_grad_(name != "m0") for name, x in inputs.items()}
        h, final = run(leaves, segments)
        found = {"h": h[tokens]} | {field: x[1] for field, x in zip(final._fields, final, strict=True)}
        grads = gradients([h[tokens], *(x[1] for x in final if x is not final.m)], leaves)
        for name in cell.token_inputs:
            found[f"gradient of {name}"] = grads[f"gradient of {name}"][tokens]
        for name in cell.state_inputs:
            if name != "m0":
                found[f"gradient of {name}"] = grads[f"gradient of {name}"][1]
        return {name: x.detach() for name, x in found.items()}

    assert_all_close(of_the_segment(spoiled), of_the_segment(inputs), cell)


@every_implementation
def test_the_scale_of_the_initial_state_does_not_matter(cell: Cell, implementation: str):
    segments = Segments.from_lengths([5, 1, 37, 0])
    run = cell.implementations[implementation]
    inputs = cell.make_inputs(segments, torch.float64, with_state=True)
    shift = torch.tensor(3.0, dtype=torch.float64)
    rescaled = inputs | {"c0": inputs["c0"] * torch.exp(-shift), "n0": inputs["n0"] * torch.exp(-shift)}
    rescaled["m0"] = inputs["m0"] + shift
    h, state = run(inputs, segments)
    h_rescaled, state_rescaled = run(rescaled, segments)
    assert_close(h_rescaled, h, cell.name, "h")
    for actual, expected in zip(true_memory(state_rescaled), true_memory(state), strict=True):
        assert_close(actual, expected, cell.name, "memory")


@every_implementation
def test_an_empty_segment_hands_its_initial_state_on(cell: Cell, implementation: str):
    segments = Segments.from_lengths([0, 3, 0])
    inputs = cell.make_inputs(segments, torch.float64, with_state=True)
    _, state = cell.implementations[implementation](inputs, segments)
    for g in (0, 2):
        for name, x in zip(cell.state_inputs, state, strict=True):
            assert x[g].equal(inputs[name][g])


@every_implementation
def test_inputs_need_not_be_contiguous(cell: Cell, implementation: str):
    segments = Segments.from_lengths([7, 33, 2])
    run = cell.implementations[implementation]
    inputs = cell.make_inputs(segments, torch.float64, with_state=True)

    def of_views(leaves: Inputs, segments: Segments):
        strided = {name: torch.stack([x, x], -1)[..., 0] for name, x in leaves.items()}
        assert not any(x.is_contiguous() for x in strided.values())
        return run(strided, segments)

    assert_all_close(results(of_views, inputs, segments), results(run, inputs, segments), cell)


@every_implementation
def test_a_gradient_that_is_an_expanded_scalar_is_understood(cell: Cell, implementation: str):
    """What `h.sum()` sends back has stride 0."""
    segments = Segments.from_lengths([7, 33, 2])
    inputs = cell.make_inputs(segments, torch.float64)
    grads = []
    for run in (cell.implementations[implementation], cell.reference):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        grads.append(torch.autograd.grad(run(leaves, segments)[0].sum(), list(leaves.values())))
    for name, actual, expected in zip(inputs, *grads, strict=True):
        assert_close(actual, expected, cell.name, f"gradient of {name}")


@every_implementation
def test_one_input_alone_can_want_a_gradient(cell: Cell, implementation: str):
    segments = Segments.from_lengths([7, 33, 2])
    run = cell.implementations[implementation]
    inputs = cell.make_inputs(segments, torch.float64, with_state=True)
    expected = results(run, inputs, segments, outputs_of=lambda state: [])
    for name in [name for name in inputs if name != "m0"]:
        leaves = inputs | {name: inputs[name].clone().requires_grad_()}
        h, _ = run(leaves, segments)
        (grad,) = gradients([h], {name: leaves[name]}).values()
        assert_close(grad, expected[f"gradient of {name}"], cell.name, f"gradient of {name}")


@every_implementation
def test_a_loss_of_the_final_state_alone_reaches_every_token(cell: Cell, implementation: str):
    segments = Segments.from_lengths([7, 33, 2])
    inputs = cell.make_inputs(segments, torch.float64, with_state=True)
    found = []
    for run in (cell.implementations[implementation], cell.reference):
        leaves = {name: x.clone().requires_grad_(name != "m0") for name, x in inputs.items()}
        _, state = run(leaves, segments)
        found.append(gradients(true_memory(state), leaves))
    assert_all_close(found[0], found[1], cell)


@every_implementation
def test_segments_met_in_inference_mode_can_be_trained_on(cell: Cell, implementation: str):
    """What is remembered about their layout must not be an inference tensor."""
    segments = Segments.from_lengths([11, 0, 3])
    run = cell.implementations[implementation]
    inputs = cell.make_inputs(segments, torch.float64)
    with torch.inference_mode():
        h, _ = run(inputs, segments)
    assert results(run, inputs, segments)["h"].equal(h)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("cell", [MLSTM, SLSTM], ids=["mlstm", "slstm"])
def test_autocast_leaves_the_cell_in_full_precision(cell: Cell, backend: str):
    segments = Segments.from_lengths([7, 70, 2])
    run = cell.implementations[backend]
    inputs = cell.make_inputs(segments, torch.float32, with_state=True)

    def under_autocast(leaves: Inputs, segments: Segments):
        with torch.autocast("cpu", torch.bfloat16):
            return run(leaves, segments)

    expected, actual = (results(r, inputs, segments) for r in (run, under_autocast))
    for name, value in expected.items():
        assert actual[name].equal(value), name


@every_fast_implementation
def test_a_backward_pass_under_autocast_keeps_full_precision_too(cell: Cell, implementation: str):
    segments = Segments.from_lengths([7, 70, 2])
    run = cell.implementations[implementation]
    inputs = cell.make_inputs(segments, torch.float32, with_state=True)
    leaves = {name: x.clone().requires_grad_(name != "m0") for name, x in inputs.items()}
    h, state = run(leaves, segments)
    loss = h.square().sum() + sum(x.sum() for x in state if x is not state.m)
    wanted = [x for x in leaves.values() if x.requires_grad]
    expected = torch.autograd.grad(loss, wanted, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(loss, wanted)
    assert all(a.equal(e) for a, e in zip(actual, expected, strict=True))
