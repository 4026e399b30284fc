"""Parameters, FLOPs and state of the architectures beside MoxE, against real models and torch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from moxe.models.accounting import CONTEXT, count_parameters, flops_per_token, part_of, state_bytes
from moxe.models.architectures import ARCHITECTURES, build_model

ATTENTION = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SIZES: dict[str, dict[str, Any]] = {
    "xlstm": {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 4, "num_heads": 2, "mlstm_per_slstm": 2},
    "gemma2": {**ATTENTION, "head_dim": 16, "intermediate_size": 40, "sliding_window": 4},
    "qwen2_moe": {
        **ATTENTION,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
    },
    "llama": {**ATTENTION, "intermediate_size": 40},
}
NAMES = tuple(SIZES)
OF_TRANSFORMERS = ("gemma2", "qwen2_moe", "llama")


def tiny(name: str, **settings: Any) -> Any:
    return ARCHITECTURES[name].build_config({**SIZES[name], **settings})


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_real_model_part_by_part(name: str):
    config = tiny(name)
    model, count = build_model(config), count_parameters(config)
    assert count.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    by_part = dict.fromkeys(count.total_by_part, 0)
    for parameter_name, parameter in model.named_parameters():
        by_part[part_of(parameter_name)] += parameter.numel()
    assert count.total_by_part == by_part
    if name != "qwen2_moe":
        assert count.active_parameters == count.total_parameters == count.min_active_parameters


def test_active_parameters_of_a_mixture_are_those_that_one_token_meets():
    count, all_chosen = (count_parameters(tiny("qwen2_moe", num_experts_per_tok=k)) for k in (2, 6))
    one_expert = 3 * 32 * 12
    assert count.total_parameters - count.active_parameters == 3 * (6 - 2) * one_expert
    assert count.min_active_parameters == count.max_active_parameters == count.active_parameters
    assert all_chosen.active_parameters == all_chosen.total_parameters == count.total_parameters
    assert count.total_by_part["ffn_experts"] == 3 * 6 * one_expert
    assert count.total_by_part["shared_experts"] == 3 * (3 * 32 * 20 + 32)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_flops_are_what_torch_counts_in_a_real_forward(name: str):
    """The eager attention computes every pair of tokens of a row, so that C is the length of the row there.

    The experts of a mixture are all chosen: torch counts what is computed, and K / E of it is a mean.
    """
    settings = {"num_experts_per_tok": 6} if name == "qwen2_moe" else {}
    config = tiny(name, **settings)
    if name == "gemma2":
        config.sliding_window = 100  # what the window hides is computed too
    config._attn_implementation = "eager"
    model = build_model(config).eval()
    if name == "qwen2_moe":
        model.set_experts_implementation("eager")
    num_tokens = 7
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(num_tokens)[None], use_cache=False)
    assert counter.get_total_flops() == num_tokens * flops_per_token(config, context=num_tokens).flops_per_token


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_attention_costs_4_flops_a_number_and_token_it_attends_to(name: str):
    config = tiny(name)
    size = 16 if name == "gemma2" else 8
    window = [4, 100, 4] if name == "gemma2" else [100] * 3
    assert flops_per_token(config, context=100).by_part["attention"].attention == 4 * 4 * size * sum(window)
    assert flops_per_token(config) == flops_per_token(config, context=CONTEXT)
    at_one, at_two = (flops_per_token(config, context=context).flops_per_token for context in (1, 2))
    assert at_two - at_one == 4 * 4 * size * 3


def test_the_blocks_of_an_xlstm_cost_what_the_mixers_of_moxe_cost():
    """Two sLSTM and two mLSTM blocks, in two MoxE layers or in a model of their own."""
    xlstm = flops_per_token(tiny("xlstm")).by_part
    sizes = {key: value for key, value in SIZES["xlstm"].items() if key not in ("mlstm_per_slstm", "num_hidden_layers")}
    moxe = flops_per_token(ARCHITECTURES["moxe"].build_config({**sizes, "num_hidden_layers": 2})).by_part
    assert (xlstm["slstm_blocks"], xlstm["mlstm_blocks"]) == (moxe["slstm_mixers"], moxe["mlstm_mixers"])
    assert xlstm["head"] == moxe["head"]
    assert flops_per_token(tiny("xlstm"), context=1) == flops_per_token(tiny("xlstm"), context=1000)


@torch.no_grad()
def test_the_state_of_an_xlstm_is_that_of_its_cache_at_any_length():
    config = tiny("xlstm")
    model = build_model(config).eval()
    for length in (1, 20):
        cache = model(torch.arange(length)[None], use_cache=True).cache_params
        assert state_bytes(config) == cache.memory_bytes()


@pytest.mark.parametrize("name", ["qwen2_moe", "llama"])
@torch.no_grad()
def test_the_state_of_attention_is_that_of_its_cache(name: str):
    config = tiny(name)
    model = build_model(config).eval()
    cache = model(torch.arange(9)[None], use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    layers: list[Any] = list(cache.layers)
    held = sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))
    assert state_bytes(config, context=9) == held


def test_a_layer_with_a_window_keeps_no_more_than_it():
    config = tiny("gemma2")
    a_token = 4 * 2 * 2 * 16
    assert state_bytes(config, context=100) == a_token * (4 + 100 + 4)
    assert state_bytes(config, context=3) == a_token * 3 * 3
