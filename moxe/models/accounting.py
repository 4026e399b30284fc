"""What a configuration costs: parameters, bytes of state, FLOPs a token. Nothing is run and no weights are made.

Legend: D hidden size, I inner size of an mLSTM block, F feed-forward width, H heads, Dh = I / H, Q size of a diagonal
block, T taps, E experts, K experts a token, V vocabulary; of attention A heads, G key-value heads, Ah size of a head, C
context.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeTopKRouter

from moxe.models.architectures import architecture_of, build_model
from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.configuration_xlstm import XLSTMConfig
from moxe.models.modeling_moxe import LanguageModelHead
from moxe.modules.mlstm import MLSTMBlocks
from moxe.modules.router import Router
from moxe.modules.stacks import StackedBlockLinear, StackedConv, StackedLinear

FLOAT32_BYTES = 4
# The parts of the models and the names of their modules; those of a layer stand behind "model.layers.<number>.".
_MODULES = {
    "embedding": ("model.embed_tokens",),
    "slstm_mixers": ("slstm_mixer",),
    "mlstm_mixers": ("mlstm_mixer",),
    "slstm_blocks": ("slstm",),
    "mlstm_blocks": ("mlstm",),
    "attention": ("self_attn",),
    "feed_forward": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "layer_norms": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "routers": ("router", "mlp.gate"),
    "mlstm_experts": ("experts.mlstm",),
    "slstm_experts": ("experts.slstm",),
    "ffn_experts": ("experts.ffn", "mlp.experts"),
    "shared_experts": ("shared_expert", "mlp.shared_expert", "mlp.shared_expert_gate"),
    "final_norm": ("model.norm",),
    "head": ("lm_head",),
}
_MOXE_PARTS = (
    "embedding",
    "slstm_mixers",
    "mlstm_mixers",
    "routers",
    "shared_experts",
    "mlstm_experts",
    "slstm_experts",
    "ffn_experts",
    "final_norm",
    "head",
)
# The parts that are made of blocks, and the blocks' kind; that of a shared expert stands in the configuration.
_BLOCK_KIND = {
    "slstm_mixers": "slstm",
    "mlstm_mixers": "mlstm",
    "slstm_blocks": "slstm",
    "mlstm_blocks": "mlstm",
    "mlstm_experts": "mlstm",
    "slstm_experts": "slstm",
    "ffn_experts": "ffn",
}
_EXPERT_PARTS = ("mlstm_experts", "slstm_experts", "ffn_experts")
# The parameters of a module that meet every token of it in a matrix product.
_MATRICES: dict[type[nn.Module], tuple[str, ...]] = {
    LanguageModelHead: ("weight",),
    StackedLinear: ("weight",),
    StackedBlockLinear: ("weight",),
    MLSTMBlocks: ("gate_weight",),
    Router: ("weight", "difficulty_weight"),
    nn.Linear: ("weight",),
    Qwen2MoeTopKRouter: ("weight",),
    Qwen2MoeExperts: ("gate_up_proj", "down_proj"),
}
CONTEXT = 256
"""Tokens that a token is taken to attend to, itself included, where nothing else is said: the paper's context."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model: all of them, and those that one token meets.

    Args:
        total_parameters: every parameter once; a tied head counts for nothing.
        active_parameters: all but the experts, plus K / E of the experts' parameters: the mean over tokens when every
            expert gets its share, rounded for each kind. The embedding counts whole.
        min_active_parameters, max_active_parameters: for a token whose K experts are the smallest or largest ones.
        total_by_part, active_by_part: the first two, by part (all layers together). Of a MoxE: embedding, slstm_mixers,
            mlstm_mixers, routers, shared_experts, mlstm_experts, slstm_experts, ffn_experts, final_norm, head. Between
            embedding and final_norm an xLSTM has slstm_blocks and mlstm_blocks; a model of transformers has attention,
            layer_norms, and feed_forward or routers, ffn_experts and shared_experts.
    """

    total_parameters: int
    active_parameters: int
    min_active_parameters: int
    max_active_parameters: int
    total_by_part: dict[str, int]
    active_by_part: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class PartFlops:
    """FLOPs a token in one part: products with weights, convolutions, the cells' recurrence, products of attention."""

    projections: int
    convolutions: int
    cells: int
    attention: int = 0

    @property
    def total(self) -> int:
        return self.projections + self.convolutions + self.cells + self.attention


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of the forward pass for one token, by part (names as in `ParameterCount`)."""

    by_part: dict[str, PartFlops]

    @property
    def flops_per_token(self) -> int:
        return sum(part.total for part in self.by_part.values())

    def to_dict(self) -> dict[str, Any]:
        by_part = {name: dataclasses.asdict(part) for name, part in self.by_part.items()}
        return {"flops_per_token": self.flops_per_token, "flops_by_part": by_part}


def count_parameters(config: PreTrainedConfig) -> ParameterCount:
    """Counts the parameters of the model that `config` describes, of any architecture, built on the meta device."""
    counted = Counter[str]()
    for name, parameter in _meta_model(config).named_parameters():  # a tied weight comes once, as the embedding
        counted[part_of(name)] += parameter.numel()
    parts = _MOXE_PARTS if isinstance(config, MoxEConfig) else [p for p in _MODULES if counted[p] or p == "head"]
    total = {part: counted[part] for part in parts}
    active = {part: _active_share(part, count, config) for part, count in total.items()}
    always = sum(count for part, count in total.items() if part not in _EXPERT_PARTS)
    # Sizes of the experts, each summed over the layers.
    sizes = sorted(total[part] // number for part, number in _experts_a_layer(config).items() for _ in range(number))
    chosen = getattr(config, "num_experts_per_tok", 0)
    return ParameterCount(
        total_parameters=sum(total.values()),
        active_parameters=sum(active.values()),
        min_active_parameters=always + sum(sizes[:chosen]),
        max_active_parameters=always + sum(sizes[len(sizes) - chosen :]),
        total_by_part=total,
        active_by_part=active,
    )


def state_bytes(config: Any, context: int = CONTEXT) -> int:
    """Bytes of float32 state that one sequence holds behind its last token.

    An mLSTM block holds its window, C, n and m: (T - 1) I + I^2 / H + I + H numbers; an sLSTM block its window, c, n,
    m and h: (T - 1) D + 4 D. A MoxE layer has one mixer of each kind and perhaps a shared expert, and with
    `expert_memory="sequence"` all E experts hold a state; feed-forward experts hold none. Of these nothing grows with
    the sequence.

    An attention layer keeps keys and values, 2 G Ah numbers, of `context` tokens, or of its window if that is shorter.
    """
    if not architecture_of(config).is_ours:
        return FLOAT32_BYTES * 2 * config.num_key_value_heads * head_size(config) * sum(_attended(config, context))
    hidden, inner, heads = config.hidden_size, config.mlstm_inner_size, config.num_heads
    window = config.conv_kernel_size - 1
    numbers = {
        "mlstm": window * inner + inner**2 // heads + inner + heads,
        "slstm": window * hidden + 4 * hidden,
        "ffn": 0,
    }
    return FLOAT32_BYTES * sum(
        number * numbers[_kind_of(part, config)]
        for part, number in _blocks(config).items()
        if part not in _EXPERT_PARTS or config.expert_memory == "sequence"
    )


def flops_per_token(config: PreTrainedConfig, context: int = CONTEXT) -> FlopCount:
    """FLOPs of the forward pass for one token; a multiplication and an addition count one each.

    Projections: 2 for each weight that meets the token, so for one block or part
        mLSTM block   2 (2 D I + 3 I Q + 6 I H + I D)    up; q, k, v; gates; down
                      + 2 (3 D F)                        feed-forward part of an expert that has one
        sLSTM block   2 (4 D^2 / H + 3 D F)              gates; feed-forward part
        ffn expert    2 (3 D F)
        router        2 (D E + D)                        logits; difficulty (of the entropy router alone)
        head          2 D V
    and in a model of transformers
        attention     2 (2 D A Ah + 2 D G Ah)            queries and output; keys and values
        feed-forward  2 (3 D F)                          also of an expert
        shared expert 2 (3 D F + D)                      with the gate that weighs it
    Convolutions: 2 I T in an mLSTM block, 2 D T in an sLSTM block.
    Cells, in the recurrent form that decoding runs:
        mLSTM         H (5 Dh^2 + 7 Dh)   f C + i k v^T (3 Dh^2), C^T q (2 Dh^2); n, n q, scaling of k, division (7 Dh)
        sLSTM         8 D^2 / H + 11 D    R h for four gates (8 D^2 / H), added to them (4 D); c, n, h (7 D)
    The chunkwise form that training runs trades the mLSTM cell's work for products inside chunks; how many depends on
    the chunk.
    Attention, a layer: 4 A Ah C, queries with keys and weights with values, for a token that attends to C = `context`
    tokens, itself included, or to the layer's window if that is shorter. The mean over a row of S tokens is that of
    C = (S + 1) / 2; an implementation that computes what the causal mask then hides spends that of C = S.
    Experts count with K / E of all of them, as in `ParameterCount.active_parameters`, a shared one whole. Norms,
    activations, gate exponentials, softmax, rotary positions, the embedding's look-up and the weighted sum of the
    experts (2 K D) are left out.
    """
    projections, convolutions = Counter[str](), Counter[str]()
    for module_name, module in _meta_model(config).named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            part = part_of(f"{module_name}.{name}")
            if name in _MATRICES.get(type(module), ()):
                projections[part] += 2 * parameter.numel()
            elif isinstance(module, StackedConv) and name == "weight":
                convolutions[part] += 2 * parameter.numel()
    counts = (projections, convolutions, _cell_flops(config), _attention_flops(config, context))
    by_part = {
        part: PartFlops(*(_active_share(part, flops[part], config) for flops in counts))
        for part in _MODULES
        if projections[part]
    }
    return FlopCount(by_part)


def _cell_flops(config: Any) -> Counter[str]:
    if not architecture_of(config).is_ours:
        return Counter()
    hidden, inner, heads = config.hidden_size, config.mlstm_inner_size, config.num_heads
    head_size = inner // heads
    cell = {
        "mlstm": heads * (5 * head_size**2 + 7 * head_size),
        "slstm": 8 * hidden**2 // heads + 11 * hidden,
        "ffn": 0,
    }
    return Counter({part: number * cell[_kind_of(part, config)] for part, number in _blocks(config).items()})


def _attention_flops(config: Any, context: int) -> Counter[str]:
    if architecture_of(config).is_ours:
        return Counter()
    return Counter({"attention": 4 * config.num_attention_heads * head_size(config) * sum(_attended(config, context))})


def _attended(config: Any, context: int) -> list[int]:
    """How many of the last `context` tokens each attention layer sees."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [min(context, config.sliding_window) if kind == "sliding_attention" else context for kind in kinds]


def head_size(config: Any) -> int:
    """Numbers of one head of attention, Ah."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _meta_model(config: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return build_model(config)


def part_of(parameter_name: str) -> str:
    """The part that a parameter belongs to, by its name in the model's `named_parameters`; "head" is an untied one.

    The parts are those of `ParameterCount`.
    """
    name = re.sub(r"^model\.layers\.\d+\.", "", parameter_name)
    return next(part for part, modules in _MODULES.items() if name.startswith(tuple(f"{m}." for m in modules)))


def _experts_a_layer(config: PreTrainedConfig) -> dict[str, int]:
    """How many experts of each part one layer has."""
    if isinstance(config, Qwen2MoeConfig):
        return {"ffn_experts": config.num_experts}
    if not isinstance(config, MoxEConfig):
        return {}
    if config.expert_kind == "xlstm":
        return {"mlstm_experts": config.num_experts // 2, "slstm_experts": config.num_experts // 2}
    return {f"{config.expert_kind}_experts": config.num_experts}


def _kind_of(part: str, config: Any) -> str:
    return config.shared_expert if part == "shared_experts" else _BLOCK_KIND[part]


def _blocks(config: Any) -> dict[str, int]:
    """How many blocks of each part a model of xLSTM blocks has, all layers together."""
    layers = range(config.num_hidden_layers)
    if isinstance(config, XLSTMConfig):
        return dict(Counter(f"{config.block_kind(block)}_blocks" for block in layers))
    shared = {} if config.shared_expert == "none" else {"shared_experts": 1}
    a_layer = {"slstm_mixers": 1, "mlstm_mixers": 1, **shared, **_experts_a_layer(config)}
    return {part: len(layers) * number for part, number in a_layer.items()}


def _active_share(part: str, count: int, config: Any) -> int:
    if part not in _EXPERT_PARTS:
        return count
    return round(count * config.num_experts_per_tok / config.num_experts)
