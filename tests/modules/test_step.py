"""One token of a few rows in C++, in place on the state, against the blocks' ordinary forward pass over one token.

Legend: N rows, K choices a row, E blocks, D hidden size.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from moxe.modules.mlstm import MLSTMBlocks
from moxe.modules.slstm import SLSTMBlocks
from moxe.modules.stacks import BlockState
from moxe.ops.cpu import build
from moxe.ops.segments import Segments
from tests.models.tiny import scramble
from tests.tolerances import BF16, F32, F64, assert_close

Blocks = MLSTMBlocks | SLSTMBlocks

E, FIRST, K = 3, 2, 2
# Whole vectors and whole tasks; and what ends in the middle of each, with a single tap.
SIZES = {
    "even": {"hidden": 64, "inner": 128, "diagonal": 16, "ffn": 64, "heads": 2, "taps": 4},
    "odd": {"hidden": 39, "inner": 150, "diagonal": 6, "ffn": 37, "heads": 3, "taps": 3},
    "one head, one tap": {"hidden": 5, "inner": 7, "diagonal": 7, "ffn": 3, "heads": 1, "taps": 1},
}
every_size = pytest.mark.parametrize("size", SIZES)
every_kind = pytest.mark.parametrize("kind", ["mlstm", "slstm"])
every_kind_and_option = pytest.mark.parametrize("kind", ["mlstm", "slstm", "mlstm and feed-forward"])
every_dtype = pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)

pytestmark = pytest.mark.usefixtures("compiler", "no_gradients")


@pytest.fixture
def compiler():
    if reason := build.why_unavailable():
        pytest.skip(reason)


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def three_threads():
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def make_blocks(kind: str, size: str, backend: str = "reference") -> Blocks:
    torch.manual_seed(0)
    of = SIZES[size]
    shared = {
        "hidden_size": of["hidden"],
        "num_heads": of["heads"],
        "conv_kernel_size": of["taps"],
        "norm_eps": 1e-5,
        "num_residual_blocks": 6,
        "backend": backend,
    }
    if kind == "slstm":
        blocks: Blocks = SLSTMBlocks(E, ffn_size=of["ffn"], residual_block=2, **shared)
    else:
        ffn_size = 0 if kind == "mlstm" else of["ffn"]
        blocks = MLSTMBlocks(E, inner_size=of["inner"], qkv_block_size=of["diagonal"], ffn_size=ffn_size, **shared)
    scramble(blocks)
    return blocks


def segment_of(block: int) -> Segments:
    """One token for one block of the stack."""
    return Segments.from_lengths([1], group_offsets=(0,) * (block + 1) + (1,) * (E - block))


def empty_state(blocks: Blocks, x: Tensor) -> BlockState:
    """[N, E, ...] before the first token; what `forward` keeps of one says its shapes."""
    _, state = blocks(x[:1], segment_of(0), None, True)
    assert state is not None
    return {
        name: tensor.new_full((len(x), E, *tensor.shape[1:]), -torch.inf if name == "m" else 0)
        for name, tensor in state.items()
    }


def step_by_forward(
    blocks: Blocks, x: Tensor, experts: Tensor, weights: Tensor, state: BlockState, out: Tensor
) -> None:
    """The oracle: each choice of each row by itself."""
    for n, of_row in enumerate(experts.tolist()):
        for k, expert in enumerate(of_row):
            e = expert - FIRST
            if not 0 <= e < E:
                continue
            y, new = blocks(x[n : n + 1], segment_of(e), {name: s[n : n + 1, e] for name, s in state.items()}, True)
            assert new is not None
            out[n] += weights[n, k] * y[0]
            for name, tensor in state.items():
                tensor[n, e] = new[name][0]


def draw(rows: int, hidden: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D], experts and weights [N, K]; the stack holds some of the experts, several rows share one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, hidden, generator=generator)
    experts = torch.rand(rows, FIRST + E + 1, generator=generator).topk(K).indices
    return x, experts, torch.rand(rows, K, generator=generator)


def check_against_forward(kind: str, size: str, dtype: torch.dtype) -> None:
    blocks = make_blocks(kind, size, "cpu").to(dtype)
    oracle = make_blocks(kind, size, "reference").to(dtype).double()
    core = torch.promote_types(dtype, F32)
    x = draw(5, SIZES[size]["hidden"], 0)[0]
    expected_state = empty_state(oracle, x.double())
    state = {name: s.to(dtype if name == "conv" else core, copy=True) for name, s in expected_state.items()}
    chosen = []
    for token in range(6):
        x, experts, weights = draw(5, SIZES[size]["hidden"], token)
        chosen += experts.flatten().tolist()
        out, expected = x.to(core, copy=True), x.double()
        blocks.step(x.to(core), experts, weights.to(dtype), FIRST, state, out)
        step_by_forward(oracle, x.double(), experts, weights.to(dtype).double(), expected_state, expected)
        # What later tokens see of this one is kept as the model stores it.
        expected_state["conv"] = expected_state["conv"].to(dtype).double()
        assert_close(out, expected, "step", "out", computed_in=dtype)
        for name, tensor in state.items():
            assert_close(tensor, expected_state[name], "step", name, computed_in=dtype)
    assert set(chosen) == set(range(FIRST + E + 1))


@every_dtype
@every_size
@every_kind_and_option
def test_steps_equal_the_forward_pass_of_one_token_after_the_other(kind: str, size: str, dtype: torch.dtype):
    check_against_forward(kind, size, dtype)


@pytest.mark.usefixtures("three_threads")
@every_size
@every_kind_and_option
def test_steps_equal_the_forward_pass_on_several_threads(kind: str, size: str):
    check_against_forward(kind, size, F64)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@every_size
@every_kind_and_option
def test_a_row_does_not_depend_on_its_batch_mates_to_the_bit(kind: str, size: str, dtype: torch.dtype):
    blocks = make_blocks(kind, size, "cpu").to(dtype)
    x, _, _ = draw(8, SIZES[size]["hidden"], 0)
    together = empty_state(blocks, x.to(dtype))
    alone = [{name: s[n : n + 1].clone() for name, s in together.items()} for n in range(8)]
    for token in range(3):
        x, experts, weights = draw(8, SIZES[size]["hidden"], token)
        out = x.clone()
        blocks.step(x, experts, weights, FIRST, together, out)
        for n in range(8):
            row = slice(n, n + 1)
            own = x[row].clone()
            blocks.step(x[row], experts[row], weights[row], FIRST, alone[n], own)
            assert torch.equal(own, out[row])
            assert all(torch.equal(s, together[name][row]) for name, s in alone[n].items())


@every_kind
def test_parameters_may_be_stored_in_several_types_and_need_not_be_contiguous(kind: str):
    blocks = make_blocks(kind, "odd").to(BF16)
    blocks.norm.float()
    blocks.conv.weight.data = blocks.conv.weight.data.mT.contiguous().mT
    assert not blocks.conv.weight.is_contiguous()
    oracle = copy.deepcopy(blocks).double()
    x, experts, weights = draw(5, SIZES["odd"]["hidden"], 0)
    expected_state, expected, out = empty_state(oracle, x.double()), x.double(), x.clone()
    state = {name: s.float() for name, s in expected_state.items()}
    blocks.step(x, experts, weights, FIRST, state, out)
    step_by_forward(oracle, x.double(), experts, weights.double(), expected_state, expected)
    assert_close(out, expected, "step", "out")


@pytest.mark.parametrize(("stored", "of_conv"), [(F32, BF16), (BF16, F32)], ids=["bf16 conv", "float32 conv"])
@every_kind
def test_what_the_convolution_keeps_may_be_stored_otherwise_than_the_weights(
    kind: str, stored: torch.dtype, of_conv: torch.dtype
):
    blocks = make_blocks(kind, "odd").to(stored)
    oracle = copy.deepcopy(blocks).double()
    expected_state = empty_state(oracle, draw(5, SIZES["odd"]["hidden"], 0)[0].double())
    state = {name: s.to(of_conv if name == "conv" else F32, copy=True) for name, s in expected_state.items()}
    for token in range(3):
        x, experts, weights = draw(5, SIZES["odd"]["hidden"], token)
        out, expected = x.clone(), x.double()
        blocks.step(x, experts, weights, FIRST, state, out)
        step_by_forward(oracle, x.double(), experts, weights.double(), expected_state, expected)
        expected_state["conv"] = expected_state["conv"].to(of_conv).double()
        assert_close(out, expected, "step", "out")


@every_kind
def test_a_step_counts_as_a_change_of_the_state(kind: str):
    """Or a backward pass through an earlier token would read what is no longer there."""
    blocks = make_blocks(kind, "even")
    x, experts, weights = draw(1, 64, 0)
    state = empty_state(blocks, x)
    before = {name: tensor._version for name, tensor in state.items()}
    blocks.step(x, torch.full_like(experts[:, :1], FIRST), weights[:, :1], FIRST, state, x.clone())
    assert all(tensor._version > before[name] for name, tensor in state.items())


@every_kind
def test_what_can_not_be_stepped_is_refused(kind: str):
    blocks = make_blocks(kind, "even")
    x, experts, weights = draw(2, 64, 0)
    state = empty_state(blocks, x)
    with pytest.raises(RuntimeError, match="row 1 chooses block 2 twice"):
        blocks.step(x, torch.tensor([[0, 1], [2, 2]]), weights, FIRST, state, x.clone())
    with pytest.raises(RuntimeError, match="a state must be contiguous"):
        blocks.step(x, experts, weights, FIRST, {name: s[:1] for name, s in state.items()}, x.clone())
    with pytest.raises(RuntimeError, match=r"x and out must be contiguous \[N, D\]"):
        blocks.step(x, experts, weights, FIRST, state, x.double())
    blocks.head_norm.weight.data = blocks.head_norm.weight.data[:, :-1]
    with pytest.raises(RuntimeError, match=r"parameter \d+ must be of sizes"):
        blocks.step(x, torch.full_like(experts[:, :1], FIRST), weights[:, :1], FIRST, state, x.clone())


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@every_kind
def test_the_op_keeps_to_its_schema_and_its_fake_kernel(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    blocks = make_blocks(kind, "even").to(dtype).requires_grad_(False)
    x, experts, weights = draw(2, 64, 0)
    x = x.to(torch.promote_types(dtype, F32))
    state = empty_state(blocks, x.to(dtype))
    calls: list[tuple] = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.moxe, f"{kind}_step_", lambda *arguments: calls.append(arguments))
        blocks.step(x, experts, weights, FIRST, state, torch.zeros_like(x))
    torch.library.opcheck(getattr(torch.ops.moxe, f"{kind}_step_"), calls[0])
