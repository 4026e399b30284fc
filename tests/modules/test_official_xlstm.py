"""Our blocks against those of the official `xlstm` package (`pip install -e '.[official]'`), with the same weights.

How its parameters map to ours:
- its norms multiply by 1 + weight, ours by weight;
- its convolution weight is [C, 1, T], ours [C, T];
- its block-diagonal weights are [block, out, in], ours [block, in, out];
- its sLSTM layer feeds the product of `fgate` into the place of the input gate and that of `igate` into the forget
  gate's; the names are swapped, the cell is the paper's;
- its mLSTM adds 1e-6 to the normaliser, which the paper does not: set to 0 here to compare at full precision;
- its sLSTM finds the first token by asking whether n is 0 everywhere, which is right for whole rows as compared here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moxe.modules.mlstm import MLSTMBlocks
from moxe.modules.slstm import SLSTMBlocks
from moxe.ops.segments import Segments
from tests.models.tiny import scramble
from tests.modules.comparison import assert_equal

xlstm = pytest.importorskip("xlstm", reason="the official package is not installed")

ROWS, TOKENS, HIDDEN, HEADS = 2, 11, 32, 4


def test_the_mlstm_block_of_the_official_package_gives_our_outputs_and_gradients():
    ours = MLSTMBlocks(
        1,
        hidden_size=HIDDEN,
        inner_size=2 * HIDDEN,
        num_heads=HEADS,
        conv_kernel_size=4,
        qkv_block_size=16,
        norm_eps=1e-5,
        num_residual_blocks=6,
        backend="torch",
    )
    scramble(ours)
    theirs = official_mlstm()
    cell = theirs.xlstm.mlstm_cell
    w = {name: parameter[0] for name, parameter in ours.double().named_parameters()}
    copy(
        {
            theirs.xlstm_norm.weight: w["norm.weight"] - 1,
            theirs.xlstm.proj_up.weight: w["up_proj.weight"],
            theirs.xlstm.conv1d.conv.weight: w["conv.weight"][:, None],
            theirs.xlstm.conv1d.conv.bias: w["conv.bias"],
            theirs.xlstm.q_proj.weight: w["q_proj.weight"].mT,
            theirs.xlstm.k_proj.weight: w["k_proj.weight"].mT,
            theirs.xlstm.v_proj.weight: w["v_proj.weight"].mT,
            cell.igate.weight: w["gate_weight"][:HEADS],
            cell.igate.bias: w["gate_bias"][:HEADS],
            cell.fgate.weight: w["gate_weight"][HEADS:],
            cell.fgate.bias: w["gate_bias"][HEADS:],
            cell.outnorm.weight: w["head_norm.weight"] - 1,
            theirs.xlstm.learnable_skip: w["skip"],
            theirs.xlstm.proj_down.weight: w["down_proj.weight"],
        },
        theirs,
    )
    cell.backend_fn = partial(cell.backend_fn, eps=0.0)
    assert_same_block(ours, theirs)


def test_the_slstm_block_of_the_official_package_gives_our_outputs_and_gradients():
    theirs = official_slstm()
    ours = SLSTMBlocks(
        1,
        hidden_size=HIDDEN,
        num_heads=HEADS,
        conv_kernel_size=4,
        ffn_size=theirs.ffn.proj_down.in_features,
        norm_eps=1e-5,
        residual_block=0,
        num_residual_blocks=6,
        backend="torch",
    )
    scramble(ours)
    w = {name: parameter[0] for name, parameter in ours.double().named_parameters()}
    input_gate, forget_gate = w["if_proj.weight"].chunk(2, dim=-1)
    z_gate, output_gate = w["zo_proj.weight"].chunk(2, dim=-1)
    cell = theirs.xlstm.slstm_cell
    copy(
        {
            theirs.xlstm_norm.weight: w["norm.weight"] - 1,
            theirs.xlstm.conv1d.conv.weight: w["conv.weight"][:, None],
            theirs.xlstm.conv1d.conv.bias: w["conv.bias"],
            theirs.xlstm.fgate.weight: input_gate.mT,
            theirs.xlstm.igate.weight: forget_gate.mT,
            theirs.xlstm.zgate.weight: z_gate.mT,
            theirs.xlstm.ogate.weight: output_gate.mT,
            cell._recurrent_kernel_: cell._recurrent_kernel_ext2int(w["recurrent_weight"]),
            cell._bias_: cell._bias_ext2int(w["gate_bias"]),
            theirs.xlstm.group_norm.weight: w["head_norm.weight"] - 1,
            theirs.ffn_norm.weight: w["ffn.norm.weight"] - 1,
            theirs.ffn.proj_up.weight: w["ffn.up_proj.weight"],
            theirs.ffn.proj_down.weight: w["ffn.down_proj.weight"],
        },
        theirs,
    )
    assert_same_block(ours, theirs)


def test_the_initial_forget_biases_are_those_of_the_official_package():
    ours = SLSTMBlocks(
        1,
        hidden_size=HIDDEN,
        num_heads=HEADS,
        conv_kernel_size=4,
        ffn_size=64,
        norm_eps=1e-5,
        residual_block=2,
        num_residual_blocks=6,
        backend="torch",
    )
    theirs = official_slstm(block=2, num_blocks=6).float().xlstm.slstm_cell
    torch.testing.assert_close(ours.gate_bias[0], theirs._bias_int2ext(theirs._bias_))


def official_mlstm() -> Any:
    layer = xlstm.mLSTMLayerConfig(
        conv1d_kernel_size=4,
        qkv_proj_blocksize=16,
        num_heads=HEADS,
        proj_factor=2.0,
        embedding_dim=HIDDEN,
        context_length=TOKENS,
    )
    return xlstm.mLSTMBlock(xlstm.mLSTMBlockConfig(mlstm=layer, _num_blocks=6, _block_idx=0)).double()


def official_slstm(block: int = 0, num_blocks: int = 6) -> Any:
    layer = xlstm.sLSTMLayerConfig(embedding_dim=HIDDEN, num_heads=HEADS, conv1d_kernel_size=4, backend="vanilla")
    feed_forward = xlstm.FeedForwardConfig(proj_factor=1.7, act_fn="swish", embedding_dim=HIDDEN)
    config = xlstm.sLSTMBlockConfig(slstm=layer, feedforward=feed_forward, _num_blocks=num_blocks, _block_idx=block)
    return xlstm.sLSTMBlock(config).double()


@torch.no_grad()
def copy(values: dict[nn.Parameter, Tensor], module: nn.Module) -> None:
    """Sets every parameter of a module; one that is forgotten is an error."""
    assert {id(parameter) for parameter in values} == {id(parameter) for parameter in module.parameters()}
    for parameter, value in values.items():
        assert parameter.shape == value.shape
        parameter.copy_(value)


def assert_same_block(ours: nn.Module, theirs: nn.Module) -> None:
    """Output, and gradient of the input: which sees every weight."""
    x = torch.randn(ROWS, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    packed = x.flatten(0, 1)
    y = (packed + ours(packed, Segments.from_lengths([TOKENS] * ROWS), None, False)[0]).unflatten(0, (ROWS, TOKENS))
    expected = theirs(x)
    assert_equal(y, expected)
    projection = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours_gradient, theirs_gradient = (torch.autograd.grad((out * projection).sum(), x)[0] for out in (y, expected))
    assert_equal(ours_gradient, theirs_gradient, "gradient of x")
