"""How fresh parameters are drawn: the original xLSTM architecture's initialisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.modules.mlstm import MLSTMBlocks
from tests.models.tiny import tiny_config

HIDDEN, HEADS, LAYERS = 64, 4, 2
RESIDUAL_BLOCKS = 3 * LAYERS  # sLSTM mixer, mLSTM mixer, experts
SMALL = math.sqrt(2 / (5 * HIDDEN))
WANG = 2 / (RESIDUAL_BLOCKS * math.sqrt(HIDDEN))


@pytest.fixture(scope="module")
def fresh() -> dict[str, Tensor]:
    return fresh_parameters("xlstm")


def fresh_parameters(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = tiny_config(hidden_size=HIDDEN, num_heads=HEADS, num_hidden_layers=LAYERS, expert_kind=kind)
    return {name: p.detach() for name, p in MoxEForCausalLM(config).named_parameters()}


def named(parameters: dict[str, Tensor], *endings: str) -> dict[str, Tensor]:
    found = {name: p for name, p in parameters.items() if name.endswith(endings)}
    assert found
    return found


def assert_normal(name: str, x: Tensor, std: float) -> None:
    """Within five standard errors of mean 0 and the given standard deviation."""
    count = x.numel()
    assert abs(float(x.mean())) < 5 * std / math.sqrt(count), name
    assert float(x.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * count)), name


def test_input_projections_embedding_head_and_router_have_the_small_init(fresh: dict[str, Tensor]):
    endings = ("up_proj.weight", "_proj.weight", "embed_tokens.weight", "lm_head.weight", "router.weight")
    for name, parameter in named(fresh, *endings, "difficulty_weight").items():
        if not name.endswith("down_proj.weight"):
            assert_normal(name, parameter, SMALL)


@pytest.mark.parametrize("kind", ["xlstm", "ffn"])
def test_output_projections_have_the_wang_init_of_three_residual_blocks_a_layer(kind: str):
    for name, parameter in named(fresh_parameters(kind), "down_proj.weight").items():
        assert_normal(name, parameter, WANG)


def test_mlstm_forget_biases_run_from_3_to_6_over_the_heads(fresh: dict[str, Tensor]):
    for name, bias in named(fresh, "mlstm_mixer.gate_bias", "experts.mlstm.gate_bias").items():
        torch.testing.assert_close(bias[:, HEADS:], torch.tensor([[3.0, 4, 5, 6]]).expand(len(bias), -1), msg=name)


def test_mlstm_input_biases_are_normal_with_a_standard_deviation_of_one_tenth():
    torch.manual_seed(0)
    blocks = MLSTMBlocks(
        500,
        hidden_size=4,
        inner_size=8,
        num_heads=HEADS,
        conv_kernel_size=2,
        qkv_block_size=4,
        norm_eps=1e-5,
        num_residual_blocks=RESIDUAL_BLOCKS,
        backend="torch",
    )
    assert_normal("input gate bias", blocks.gate_bias.detach()[:, :HEADS], 0.1)


def test_mlstm_gate_weights_and_slstm_recurrent_matrices_are_zero(fresh: dict[str, Tensor]):
    for name, parameter in named(fresh, "gate_weight", "recurrent_weight").items():
        assert (parameter == 0).all(), name


@pytest.mark.parametrize(("block", "depth"), [("slstm_mixer", (0, 3)), ("experts.slstm", (2, 5))])
def test_slstm_forget_biases_fall_from_5_to_minus_7_by_a_power_of_the_depth(
    fresh: dict[str, Tensor], block: str, depth: tuple[int, int]
):
    size = HIDDEN // HEADS
    for layer, residual_block in enumerate(depth):
        bias = fresh[f"model.layers.{layer}.{block}.gate_bias"]
        power = 0.3 + 1.3 * residual_block / (RESIDUAL_BLOCKS - 1)
        expected = torch.tensor([5 - 12 * (place / (size - 1)) ** power for place in range(size)])
        torch.testing.assert_close(bias[:, :, 1], expected.expand_as(bias[:, :, 1]))
        assert (bias[:, :, [0, 2, 3]] == 0).all()


def test_norms_and_skips_are_one_and_router_biases_zero(fresh: dict[str, Tensor]):
    for name, parameter in named(fresh, "norm.weight", "skip").items():
        assert (parameter == 1).all(), name
    for name, parameter in named(fresh, "router.bias", "difficulty_bias").items():
        assert (parameter == 0).all(), name


def test_convolutions_are_uniform_within_one_over_the_root_of_the_taps(fresh: dict[str, Tensor]):
    for name, parameter in named(fresh, "conv.weight", "conv.bias").items():
        assert 0.4 < float(parameter.abs().max()) <= 0.5, name


def test_experts_of_a_stack_differ(fresh: dict[str, Tensor]):
    for name, parameter in named(fresh, "experts.mlstm.up_proj.weight", "experts.slstm.zo_proj.weight").items():
        assert not torch.equal(parameter[0], parameter[1]), name


def test_the_same_seed_gives_the_same_parameters_and_another_seed_others():
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in MoxEForCausalLM(tiny_config()).parameters()])

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
