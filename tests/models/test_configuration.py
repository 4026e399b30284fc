"""The configuration refuses what can not be a model, each time in one sentence that names the value."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM
from tests.models.tiny import tiny_config, tiny_model, token_ids

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hiden_size": 8}, "MoxEConfig has no setting 'hiden_size': did you mean 'hidden_size'?"),
    ({"num_experts": 5}, "num_experts=5 is odd: half of the experts form group M and half group S, so it must be even"),
    ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than num_experts=4"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must be a whole number of at least 1"),
    ({"hidden_size": 18, "num_heads": 4}, "hidden_size=18 is not divisible by num_heads=4"),
    ({"hidden_size": 6, "num_heads": 2, "mlstm_expansion": 1.5}, "mlstm_inner_size=9 is not divisible by num_heads=2"),
    ({"qkv_block_size": 12}, "mlstm_inner_size=32 is not divisible by qkv_block_size=12"),
    ({"gamma": -0.1}, "gamma=-0.1 must be a finite number at least 0"),
    ({"gamma": float("nan")}, "gamma=nan must be a finite number at least 0"),
    ({"gamma": float("inf")}, "gamma=inf must be a finite number at least 0"),
    ({"router_z_loss_coef": -1}, "router_z_loss_coef=-1 must be a finite number at least 0"),
    ({"mlstm_expansion": 0}, "mlstm_expansion=0 must be a finite number above 0"),
    ({"norm_eps": 0.0}, "norm_eps=0.0 must be a finite number above 0"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a whole number of at least 1"),
    ({"hidden_size": 16.0}, "hidden_size=16.0 must be a whole number of at least 1"),
    ({"num_heads": True}, "num_heads=True must be a whole number of at least 1"),
    ({"vocab_size": "40"}, "vocab_size='40' must be a whole number of at least 1"),
    ({"expert_kind": "lstm"}, "expert_kind='lstm' is not one of: xlstm, mlstm, slstm, ffn"),
    ({"expert_memory": "none"}, "expert_memory='none' is not one of: sequence, token"),
    ({"router_kind": "top"}, "router_kind='top' is not one of: entropy, standard"),
    ({"bias_kind": "mask"}, "bias_kind='mask' is not one of: standard, proportional, masked"),
    (
        {"group_loss_kind": "mse"},
        "group_loss_kind='mse' is not one of: kl, squared_difference, squared_distance, jensen_shannon",
    ),
    (
        {"ffn_residual": False},
        "ffn_residual=False is for feed-forward experts: with it expert_kind='xlstm' must be ffn",
    ),
    ({"mlstm_ffn_expansion": -1.5}, "mlstm_ffn_expansion=-1.5 must be a finite number at least 0"),
    ({"mlstm_ffn_expansion": 65}, "mlstm_ffn_expansion=65 must be at most 64"),
    ({"difficulty_target": "loss"}, "difficulty_target='loss' is not one of: router_entropy, token_loss"),
    ({"detach_difficulty_target": None}, "detach_difficulty_target=None must be true or false"),
    ({"load_balancing": "none"}, "load_balancing='none' is not one of: loss, bias"),
    ({"balancing_bias_rate": -0.1}, "balancing_bias_rate=-0.1 must be a finite number at least 0"),
    ({"shared_expert": "xlstm"}, "shared_expert='xlstm' is not one of: none, ffn, mlstm, slstm"),
    ({"ffn_residual": 0}, "ffn_residual=0 must be true or false"),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED, ids=[f"{settings}" for settings, _ in REFUSED])
def test_a_setting_that_can_not_be_is_refused_with_its_sentence(settings: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        tiny_config(**settings)


def test_an_unknown_backend_is_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="backend='cuda' is not one of: auto, reference, torch, cpu"):
        tiny_config(backend="cuda")


def test_an_unknown_setting_that_resembles_none_is_refused_with_all_names():
    with pytest.raises(ValueError, match="MoxEConfig has no setting 'zzz': valid names: vocab_size, hidden_size"):
        tiny_config(zzz=1)


def test_a_configuration_file_with_an_unknown_setting_is_refused(tmp_path: Path):
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_expert": 8}), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape("no setting 'num_expert': did you mean 'num_experts'?")):
        MoxEConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("bad", [-1, 40, 99])
def test_a_token_id_outside_the_vocabulary_is_refused(bad: int):
    model, ids = tiny_model(), token_ids(2, 5)
    ids[1, 3] = bad
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary: ids run from 0 to 39"):
        model(ids)


def test_a_masked_out_column_may_hold_any_id():
    model, ids = tiny_model(), token_ids(1, 5)
    mask = torch.tensor([[0, 1, 1, 1, 0]])
    ids[0, 0], ids[0, 4] = -100, 10**6
    model(ids, attention_mask=mask, labels=ids)


@pytest.mark.parametrize("name", ["attention_mask", "document_ids", "labels"])
def test_an_input_of_another_shape_than_the_token_ids_is_refused(name: str):
    model, ids = tiny_model(), token_ids(2, 5)
    with pytest.raises(ValueError, match=re.escape(f"{name} must have the shape of input_ids (2, 5), got (2, 4)")):
        model(ids, **{name: torch.ones(2, 4, dtype=torch.int64)})


def test_token_ids_without_a_row_axis_are_refused():
    with pytest.raises(ValueError, match=re.escape("input_ids must be [B, S], got shape (5,)")):
        tiny_model()(token_ids(1, 5)[0])


def test_every_setting_is_documented_and_nothing_else():
    """The docstring names each; a name that appears in the text with its colon is a setting."""
    text = inspect.getdoc(MoxEConfig) or ""
    arguments = text[text.index("Args:") : text.index("Raises:")]
    documented = {
        name for line in re.findall(r"^    (\w[\w, ]*):", arguments, re.MULTILINE) for name in re.split(r", ", line)
    }
    token_numbers = {"pad_token_id", "bos_token_id", "eos_token_id"}
    assert documented | token_numbers == set(MoxEConfig.setting_names()) | token_numbers


def test_defaults_are_the_released_ones():
    config = MoxEConfig()
    expected = {
        "gamma": 0.7,
        "router_bias": True,
        "difficulty_loss_coef": 0.01,
        "group_loss_coef": 0.01,
        "router_z_loss_coef": 0.001,
        "load_balancing_loss_coef": 0.01,
        "expert_memory": "sequence",
        "group_loss_kind": "kl",
        "bias_kind": "standard",
        "slstm_ffn_expansion": 1.7,
        "mlstm_expansion": 2.0,
        "conv_kernel_size": 4,
        "qkv_block_size": 16,
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_feed_forward_widths_are_rounded_up_to_a_multiple_of_64():
    config = MoxEConfig(hidden_size=640, slstm_ffn_expansion=1.7, ffn_expansion=2.2)
    assert (config.slstm_ffn_size, config.ffn_size, config.mlstm_inner_size) == (1088, 1408, 1280)
    assert config.mlstm_ffn_size == 0
    assert MoxEConfig(hidden_size=640, mlstm_ffn_expansion=1.3).mlstm_ffn_size == 832


def test_a_configuration_survives_its_file(tmp_path: Path):
    config = tiny_config(gamma=0.3, expert_kind="ffn", pad_token_id=0, eos_token_id=1, tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    again = MoxEConfig.from_pretrained(tmp_path)
    names = MoxEConfig.setting_names()
    assert {name: getattr(again, name) for name in names} == {name: getattr(config, name) for name in names}


def test_the_public_example_runs():
    model = MoxEForCausalLM(MoxEConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_experts=4))
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 64)
