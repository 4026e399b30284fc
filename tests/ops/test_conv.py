"""The causal convolution over segments against a loop over tokens and taps.

Legend: N packed tokens, C channels, G segments, E groups.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moxe.ops.conv import causal_conv
from moxe.ops.cpu import build
from moxe.ops.segments import Segments
from tests.ops.layouts import LAYOUTS, group_of_segment, segments_of
from tests.oracles import conv_by_loop
from tests.tolerances import assert_close

CHANNELS = 21  # more than a vector of any machine, and no whole number of vectors


def draw(segments: Segments, taps: int, dtype: torch.dtype, with_state: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (segments.num_tokens, CHANNELS),
        "weight": (segments.num_groups, CHANNELS, taps),
        "bias": (segments.num_groups, CHANNELS),
    }
    if with_state:
        shapes["initial_state"] = (segments.num_segments, taps - 1, CHANNELS)
    # Weights stay float32 under autocast, tokens and state do not.
    dtypes = {name: torch.promote_types(dtype, torch.float32) for name in ("weight", "bias")}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtypes.get(name, dtype))
        for name, shape in shapes.items()
    }


def leaves_of(inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: x.to(dtype or x.dtype, copy=True).requires_grad_() for name, x in inputs.items()}


def gradients(y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    loss = (y.double() * torch.randint(-9, 10, y.shape, generator=generator)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def check_against_loop(
    segments: Segments, taps: int, dtype: torch.dtype, *, with_state: bool, silu: bool, backend: str
) -> None:
    inputs = draw(segments, taps, dtype, with_state)
    leaves, of_loop = leaves_of(inputs), leaves_of(inputs, torch.float64)
    y, state = causal_conv(
        leaves["x"],
        leaves["weight"],
        leaves["bias"],
        segments,
        silu=silu,
        initial_state=leaves.get("initial_state"),
        return_final_state=True,
        backend=backend,
    )
    nothing = torch.zeros(segments.num_segments, taps - 1, CHANNELS, dtype=torch.float64)
    expected, last_inputs = conv_by_loop(
        of_loop["x"],
        of_loop["weight"],
        of_loop["bias"],
        segments.cu_seqlens.tolist(),
        group_of_segment(segments),
        of_loop.get("initial_state", nothing),
    )
    expected = F.silu(expected) if silu else expected
    assert state is not None
    assert y.dtype == dtype
    assert state.double().equal(last_inputs)
    assert_close(y, expected, "conv", "y")
    grads, expected_grads = gradients(y, leaves), gradients(expected, of_loop)
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], "conv", f"gradient of {name}", computed_in=dtype)


with_or_without_silu = pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_state", [False, True], ids=["no state", "initial state"])
@pytest.mark.parametrize("layout", LAYOUTS)
@with_or_without_silu
def test_outputs_states_and_gradients_match_the_loop(
    layout: str, with_state: bool, dtype: torch.dtype, silu: bool, backend: str
):
    check_against_loop(segments_of(layout), 4, dtype, with_state=with_state, silu=silu, backend=backend)


@pytest.mark.parametrize("taps", [1, 2, 3, 5])
def test_any_number_of_taps(taps: int, backend: str):
    segments = segments_of("three groups")
    check_against_loop(segments, taps, torch.float64, with_state=True, silu=True, backend=backend)


def test_segments_and_groups_longer_than_a_task(backend: str):
    segments = Segments.from_lengths([40, 150, 3, 64, 65], (0, 2, 5))
    check_against_loop(segments, 4, torch.float64, with_state=True, silu=True, backend=backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poisoned_memory")
def test_no_uninitialised_memory_is_ever_read(layout: str, backend: str):
    check_against_loop(segments_of(layout), 4, torch.float32, with_state=False, silu=True, backend=backend)


@with_or_without_silu
def test_gradients_are_those_of_finite_differences(silu: bool, backend: str):
    segments = Segments.from_lengths([3, 0, 2, 1], (0, 1, 1, 4))
    inputs = draw(segments, 3, torch.float64, with_state=True)

    def conv(x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor) -> Tensor:
        return causal_conv(x, weight, bias, segments, silu=silu, initial_state=initial_state, backend=backend)[0]

    inputs = {name: x[..., :2] if name in ("x", "initial_state") else x[:, :2] for name, x in inputs.items()}
    assert torch.autograd.gradcheck(conv, list(leaves_of(inputs).values()))


def test_packed_equals_separate_and_split_and_resume_equals_whole(backend: str):
    segments = Segments.from_lengths([5, 0, 2, 9])
    inputs = draw(segments, 4, torch.float64, with_state=True)
    x, weights, state = inputs["x"], (inputs["weight"], inputs["bias"]), inputs["initial_state"]
    whole, final = causal_conv(x, *weights, segments, initial_state=state, return_final_state=True, backend=backend)
    assert final is not None
    for g, tokens in enumerate(x.split(segments.lengths.tolist())):
        y, own = [], state[g : g + 1]
        for part in tokens.split(2):
            part_y, own = causal_conv(
                part,
                *weights,
                Segments.from_lengths([len(part)]),
                initial_state=own,
                return_final_state=True,
                backend=backend,
            )
            y.append(part_y)
        assert_close(torch.cat(y), whole[segments.segment_of_token == g], "conv", "y")
        assert own is not None
        assert own[0].equal(final[g])


def test_batch_mates_never_matter_not_even_when_they_are_nan(backend: str):
    segments = Segments.from_lengths([6, 5, 7])
    inputs = draw(segments, 4, torch.float64, with_state=True)
    tokens = segments.segment_of_token == 1
    spoiled = {name: x.clone() for name, x in inputs.items()}
    spoiled["x"][~tokens] = torch.nan
    spoiled["initial_state"][[0, 2]] = torch.nan
    found = []
    for values in (inputs, spoiled):
        leaves = leaves_of(values)
        x, weight, bias, state = (leaves[name] for name in ("x", "weight", "bias", "initial_state"))
        y, _ = causal_conv(x, weight, bias, segments, silu=True, initial_state=state, backend=backend)
        (dx,) = torch.autograd.grad(y[tokens].sum(), x)
        found.append((y[tokens], dx[tokens]))
    for actual, expected in zip(found[1], found[0], strict=True):
        assert actual.equal(expected)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"x": (4, 3)}, "(4, 3)"),
        ({"x": (5, 2)}, "(5, 2)"),
        ({"weight": (1, 3, 4)}, "(1, 3, 4)"),
        ({"bias": (2, 4)}, "(2, 4)"),
        ({"initial_state": (2, 4, 3)}, "(2, 4, 3)"),
    ],
)
def test_shapes_that_do_not_agree_are_refused_with_the_sizes(changed: dict[str, tuple[int, ...]], named: str):
    shapes = {"x": (5, 3), "weight": (2, 3, 4), "bias": (2, 3), "initial_state": (2, 3, 3)} | changed
    x, weight, bias, state = (torch.zeros(shape) for shape in shapes.values())
    with pytest.raises(ValueError, match=re.escape(named)):
        causal_conv(x, weight, bias, Segments.from_lengths([3, 2], (0, 1, 2)), initial_state=state)


def test_meta_tensors_pass_through():
    segments = segments_of("three groups")
    inputs = draw(segments, 4, torch.bfloat16, with_state=True)
    x, weight, bias, state = (inputs[name].to("meta") for name in ("x", "weight", "bias", "initial_state"))
    y, final = causal_conv(x, weight, bias, segments, initial_state=state, return_final_state=True)
    assert final is not None
    assert y.device.type == final.device.type == "meta"
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert final.shape == state.shape


def test_rows_may_lie_apart_and_gradients_need_not_be_contiguous(backend: str):
    segments = segments_of("three groups")
    inputs = draw(segments, 4, torch.float64, with_state=True)
    state = inputs["initial_state"].transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.cat([inputs["x"], inputs["x"]], 1)
    found = []
    for x in (inputs["x"].clone(), wide[:, :CHANNELS], torch.stack([inputs["x"]] * 2, 2)[..., 0]):
        x.requires_grad_()
        y, _ = causal_conv(x, inputs["weight"], inputs["bias"], segments, initial_state=state, backend=backend)
        found.append((y, *torch.autograd.grad(y.sum(), x)))
    for y, dx in found[1:]:
        assert y.equal(found[0][0])
        assert dx.equal(found[0][1])


def test_nan_spreads_to_the_tokens_whose_window_holds_it_and_to_no_other(backend: str):
    segments = Segments.from_lengths([6, 5])
    inputs = draw(segments, 4, torch.float32, with_state=False)
    inputs["x"][1, 2] = torch.nan
    y, _ = causal_conv(inputs["x"], inputs["weight"], inputs["bias"], segments, silu=True, backend=backend)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[1:5, 2] = True
    assert y.isnan().equal(expected)


@pytest.mark.parametrize("with_state", [False, True], ids=["no state", "initial state"])
def test_the_compiled_ops_keep_to_their_schemas_and_fake_kernels(with_state: bool):
    if reason := build.why_unavailable():
        pytest.skip(reason)
    segments = segments_of("three groups")
    inputs = draw(segments, 4, torch.bfloat16, with_state=with_state)
    state, where = inputs.get("initial_state"), (segments.cu_seqlens, list(segments.group_offsets), True)
    arguments = (inputs["x"], inputs["weight"], inputs["bias"], state, *where)
    torch.library.opcheck(torch.ops.moxe.causal_conv, arguments)
    torch.library.opcheck(torch.ops.moxe.causal_conv_backward, (torch.ones_like(inputs["x"]), *arguments))
    torch.library.opcheck(torch.ops.moxe.causal_conv_state, (inputs["x"], state, segments.cu_seqlens, 4))
