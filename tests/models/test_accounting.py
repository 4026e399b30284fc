"""Parameters, state and FLOPs against a real model, its real cache and torch's own counter."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moxe.models.accounting import count_parameters, flops_per_token, state_bytes
from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM
from tests.models.tiny import OPTIONS

KINDS = ("xlstm", "mlstm", "slstm", "ffn")


def tiny_config(**changes) -> MoxEConfig:
    sizes = {
        "vocab_size": 48,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    }
    return MoxEConfig(**{**sizes, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        *({"expert_kind": kind} for kind in KINDS),
        {"tie_word_embeddings": True},
        {"router_kind": "standard", "router_bias": False},
        *OPTIONS,
    ],
)
def test_the_parts_add_up_to_every_parameter_of_the_real_model(changes):
    config = tiny_config(**changes)
    model = MoxEForCausalLM(config)
    count = count_parameters(config)
    assert count.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sum(count.total_by_part.values()) == count.total_parameters
    assert sum(count.active_by_part.values()) == count.active_parameters


def test_each_part_holds_the_parameters_of_its_modules():
    config = tiny_config()
    model = MoxEForCausalLM(config)

    def number(*modules):
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    def in_layers(name):
        return number(*(layer.get_submodule(name) for layer in model.model.layers))

    assert count_parameters(config).total_by_part == {
        "embedding": number(model.model.embed_tokens),
        "slstm_mixers": in_layers("slstm_mixer"),
        "mlstm_mixers": in_layers("mlstm_mixer"),
        "routers": in_layers("router"),
        "shared_experts": 0,
        "mlstm_experts": in_layers("experts.mlstm"),
        "slstm_experts": in_layers("experts.slstm"),
        "ffn_experts": 0,
        "final_norm": number(model.model.norm),
        "head": number(model.lm_head),
    }


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_shared_expert_is_a_part_of_its_own_that_every_token_meets(kind):
    without, config = count_parameters(tiny_config()), tiny_config(shared_expert=kind)
    count, flops = count_parameters(config), flops_per_token(config).by_part
    layers = MoxEForCausalLM(config).model.layers
    size = sum(p.numel() for layer in layers for p in layer.get_submodule("shared_expert").parameters())
    assert count.total_by_part == {**without.total_by_part, "shared_experts": size}
    for name in ("total_parameters", "active_parameters", "min_active_parameters", "max_active_parameters"):
        assert getattr(count, name) == getattr(without, name) + size
    all_of_kind = flops_per_token(tiny_config(expert_kind=kind)).by_part[f"{kind}_experts"]
    assert 2 * flops["shared_experts"].total == all_of_kind.total  # K = 2 routed ones of that kind
    others = {part: cost for part, cost in flops.items() if part != "shared_experts"}
    assert others == flops_per_token(tiny_config()).by_part


def test_a_tied_head_counts_once():
    separate, tied = (count_parameters(tiny_config(tie_word_embeddings=tied)) for tied in (False, True))
    assert tied.total_by_part["head"] == 0
    assert separate.total_parameters - tied.total_parameters == separate.total_by_part["head"] == 48 * 32


def test_active_parameters_are_the_mean_least_and_most_over_the_choices_of_experts():
    config = tiny_config(num_experts_per_tok=3)
    model, count = MoxEForCausalLM(config), count_parameters(config)
    sizes = []  # of each expert, in both layers
    for kind in ("mlstm", "slstm"):
        stacks = [layer.get_submodule(f"experts.{kind}") for layer in model.model.layers]
        half = config.num_experts // 2
        sizes += [sum(parameter[e].numel() for s in stacks for parameter in s.parameters()) for e in range(half)]
    others = count.total_parameters - sum(sizes)
    active = [others + sum(choice) for choice in itertools.combinations(sizes, 3)]
    assert count.active_parameters == sum(active) / len(active)
    assert (count.min_active_parameters, count.max_active_parameters) == (min(active), max(active))
    assert min(active) < count.active_parameters < max(active)


def test_all_experts_active_means_all_parameters_active():
    count = count_parameters(tiny_config(num_experts_per_tok=6))
    assert count.active_by_part == count.total_by_part
    assert count.min_active_parameters == count.max_active_parameters == count.total_parameters


@pytest.mark.parametrize("expert_memory", ["sequence", "token"])
@pytest.mark.parametrize("expert_kind", KINDS)
def test_state_bytes_are_those_of_the_real_cache_at_any_length(expert_kind, expert_memory):
    config = tiny_config(expert_kind=expert_kind, expert_memory=expert_memory)
    model = MoxEForCausalLM(config).eval()
    with torch.no_grad():
        cache = model(torch.zeros(1, 1, dtype=torch.int64), use_cache=True).cache_params
        assert state_bytes(config) == cache.memory_bytes()
        cache = model(torch.arange(20)[None], cache_params=cache, use_cache=True).cache_params
    assert state_bytes(config) == cache.memory_bytes()


@pytest.mark.parametrize("changes", [{"conv_kernel_size": 2}, {"num_heads": 4}, {"mlstm_expansion": 1.5}, *OPTIONS])
def test_state_bytes_follow_the_sizes_of_the_configuration(changes):
    config = tiny_config(**changes)
    cache = MoxEForCausalLM(config).eval()(torch.zeros(1, 3, dtype=torch.int64), use_cache=True).cache_params
    assert state_bytes(config) == cache.memory_bytes()


def counted_flops(config: MoxEConfig, num_tokens: int) -> dict[str, int]:
    """What torch's counter sees of a real forward, by part: the products with weights.

    The cells are opaque to it, and element-wise products (the convolutions) and matrix-vector products (the
    difficulty) are not in its table. The weighted sum of the experts is, but in no part.
    """
    model = MoxEForCausalLM(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randint(config.vocab_size, (1, num_tokens)))
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    modules = {
        "slstm_mixers": "slstm_mixer",
        "mlstm_mixers": "mlstm_mixer",
        "routers": "router",
        "shared_experts": "shared_expert",
        "mlstm_experts": "experts.mlstm",
        "slstm_experts": "experts.slstm",
        "ffn_experts": "experts.ffn",
    }
    parts = {
        part: sum(
            flops.get(f"MoxEForCausalLM.model.layers.{layer}.{name}", 0) for layer in range(config.num_hidden_layers)
        )
        for part, name in modules.items()
    }
    parts["head"] = flops["MoxEForCausalLM.lm_head"]
    return {part: count for part, count in parts.items() if count}


@pytest.mark.parametrize(
    "changes",
    [
        {"expert_kind": "mlstm"},
        {"expert_kind": "slstm"},
        {"expert_kind": "ffn"},
        {"expert_kind": "mlstm", "mlstm_ffn_expansion": 1.3},
        *({"expert_kind": "mlstm", "shared_expert": kind, "mlstm_ffn_expansion": 1.3} for kind in KINDS[1:]),
    ],
)
def test_projections_are_what_torch_counts_in_a_real_forward(changes):
    config = tiny_config(**changes, router_kind="standard", backend="torch")
    by_part = flops_per_token(config).by_part
    num_tokens = 7
    assert counted_flops(config, num_tokens) == {
        part: num_tokens * flops.projections for part, flops in by_part.items()
    }


def test_projections_of_mixed_experts_are_what_torch_counts_when_all_are_chosen():
    config = tiny_config(num_experts_per_tok=6, router_kind="standard", backend="torch")
    by_part = flops_per_token(config).by_part
    assert counted_flops(config, 5) == {part: 5 * flops.projections for part, flops in by_part.items()}


def test_the_difficulty_costs_one_product_with_a_vector_in_each_layer():
    entropy, standard = (
        flops_per_token(tiny_config(router_kind=kind)).by_part["routers"] for kind in ("entropy", "standard")
    )
    assert entropy.projections - standard.projections == 2 * 32 * 2


def test_flops_follow_the_formulas_of_the_docstring():
    config = MoxEConfig()  # the paper's sizes
    d, i, h, q = config.hidden_size, config.mlstm_inner_size, config.num_heads, config.qkv_block_size
    f, t, v = config.slstm_ffn_size, config.conv_kernel_size, config.vocab_size
    e, k, layers = config.num_experts, config.num_experts_per_tok, config.num_hidden_layers
    mlstm = (2 * (2 * d * i + 3 * i * q + 6 * i * h + i * d), 2 * i * t, h * (5 * (i // h) ** 2 + 7 * (i // h)))
    slstm = (2 * (4 * d * d // h + 3 * d * f), 2 * d * t, 8 * d * d // h + 11 * d)
    expected = {
        "slstm_mixers": tuple(layers * part for part in slstm),
        "mlstm_mixers": tuple(layers * part for part in mlstm),
        "routers": (layers * 2 * (d * e + d), 0, 0),
        "mlstm_experts": tuple(layers * (e // 2) * part * k // e for part in mlstm),
        "slstm_experts": tuple(layers * (e // 2) * part * k // e for part in slstm),
        "head": (2 * d * v, 0, 0),
    }
    count = flops_per_token(config)
    assert {name: (p.projections, p.convolutions, p.cells) for name, p in count.by_part.items()} == expected
    assert count.flops_per_token == sum(sum(parts) for parts in expected.values())


def test_a_tied_head_costs_as_much_as_its_own():
    assert flops_per_token(tiny_config(tie_word_embeddings=True)) == flops_per_token(tiny_config())


def test_the_results_have_the_names_of_the_command_line():
    config = tiny_config()
    assert {"total_parameters", "active_parameters"} <= set(count_parameters(config).to_dict())
    flops = flops_per_token(config)
    assert flops.to_dict()["flops_per_token"] == flops.flops_per_token
