"""The models that a training step is compared with, each sized to the same number of non-embedding parameters.

Legend: B rows, S tokens a row, D hidden size, V vocabulary.

All keep the hidden size and the vocabulary of ours where their design allows it, and the proportions of the paper's
comparison: Qwen1.5-MoE with as many layers as ours and 6 experts of which 2 are chosen, Gemma 2 with one and a half
times as many layers, xLSTM with five mLSTM blocks after each sLSTM block. What is left, one width, is chosen so that
the parameters agree.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from moxe.benchmarks.machine import Precision
from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM

# Every side of the comparison, by name; what is shown.
LABELS = {
    "moxe": "MoxE",
    "released": "MoxE as released",
    "xlstm": "xLSTM[5:1]",
    "qwen": "Qwen1.5-MoE",
    "gemma": "Gemma 2",
}
OURS = "moxe"
OFFICIAL = ("released", "xlstm")  # made of blocks of the official package
NOT_MEASURED = "not measured: install moxe[official]"
PARAMETER_TOLERANCE = 0.03  # between the sides of a comparison

_HEAD_SIZE = 64
_XLSTM_BLOCKS = 6
_LARGEST_POSITION = 131072
_EMBEDDING_MODULES = {"embed_tokens", "token_embedding", "lm_head"}


@dataclass(frozen=True)
class Setting:
    """What a side may use: a precision, and of the peers' implementations those that transformers leaves open.

    Qwen1.5-MoE: its `experts`. Gemma 2 has no choice: transformers picks its attention.
    """

    precision: Precision = "fp32"
    experts: str | None = None
    compiled: bool = False

    @property
    def name(self) -> str:
        parts = (self.precision, self.experts, "compiled" if self.compiled else None)
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Trainee:
    """A model and its loss, a function of token ids [B, S]."""

    model: nn.Module
    loss: Callable[[Tensor], Tensor]


def plain_setting(side: str) -> Setting:
    """float32 and the plainest implementation of each side."""
    return Setting(experts="eager") if side == "qwen" else Setting()


def best_settings(side: str, *, compiled: bool = False) -> list[Setting]:
    """What a side may choose its fastest setting from; `compiled` adds torch.compile for the transformers peers."""
    precisions: tuple[Precision, ...] = ("fp32 medium", "bf16")
    if side == "qwen":
        candidates = [Setting(p, experts=experts) for p in precisions for experts in ("eager", "grouped_mm")]
    else:
        candidates = [Setting(p) for p in precisions]
    if compiled and side in ("qwen", "gemma"):
        candidates += [replace(candidate, compiled=True) for candidate in candidates]
    return candidates


def is_available(side: str) -> bool:
    """Whether the packages that a side is made of are installed."""
    if side not in OFFICIAL:
        return True
    try:
        official_package()
    except ImportError:
        return False
    return True


def official_package() -> Any:
    """The official `xlstm` package.

    Raises:
        ImportError: when it is not installed (`pip install moxe[official]`).
    """
    return importlib.import_module("xlstm")


def non_embedding_parameters(model: nn.Module) -> int:
    """Every parameter but those of the token embedding and of the language-model head."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not _EMBEDDING_MODULES.intersection(name.split("."))
    )


def build(side: str, config: MoxEConfig, length: int, setting: Setting) -> Trainee:
    """A side of the comparison with fresh weights, sized after our `config`, ready to train on rows of `length` tokens.

    Raises:
        ImportError: when the side needs the official package and that is not installed.
    """
    torch.manual_seed(0)
    if side == "moxe":
        model: Any = MoxEForCausalLM(config)
    elif side == "released":
        model = ReleasedDesign(config, length)
    elif side == "xlstm":
        model = _xlstm_model(_xlstm_width(config), config, length)
    elif side == "qwen":
        model = Qwen2MoeForCausalLM(qwen_config(config, output_router_logits=True))
        if setting.experts:
            model.set_experts_implementation(setting.experts)
    elif side == "gemma":
        model = Gemma2ForCausalLM(gemma_config(config))
    else:
        raise ValueError(f"side={side!r} is not one of: {', '.join(LABELS)}")
    model.train()
    run = torch.compile(model) if setting.compiled else model
    if side in OFFICIAL:
        return Trainee(model, lambda ids: _next_token_loss(run(ids), ids))
    return Trainee(model, lambda ids: run(input_ids=ids, labels=ids).loss)


def qwen_config(config: MoxEConfig, **settings: Any) -> Qwen2MoeConfig:
    """A Qwen1.5-MoE of the size of our `config`; the shared expert is as wide as the chosen ones together."""
    experts_per_token = 2

    def of_width(width: int) -> Qwen2MoeConfig:
        heads = max(config.hidden_size // _HEAD_SIZE, 1)
        return Qwen2MoeConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            num_experts=6,
            num_experts_per_tok=experts_per_token,
            moe_intermediate_size=width,
            shared_expert_intermediate_size=experts_per_token * width,
            max_position_embeddings=_LARGEST_POSITION,
            tie_word_embeddings=False,
            **settings,
        )

    # grouped_mm needs rows of 16 bytes, so 8 numbers of bf16
    return of_width(_fitting_width(config, lambda width: Qwen2MoeForCausalLM(of_width(width)), step=8))


def gemma_config(config: MoxEConfig) -> Gemma2Config:
    """A Gemma 2 of the size of our `config`, with half as many key-value heads as heads."""

    def of_width(width: int) -> Gemma2Config:
        heads = 2 * max(config.hidden_size // (2 * _HEAD_SIZE), 1)
        return Gemma2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=round(1.5 * config.num_hidden_layers),
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=config.hidden_size // heads,
            query_pre_attn_scalar=config.hidden_size // heads,
            intermediate_size=width,
            max_position_embeddings=_LARGEST_POSITION,
            tie_word_embeddings=False,
        )

    return of_width(_fitting_width(config, lambda width: Gemma2ForCausalLM(of_width(width)), step=8))


def _xlstm_width(config: MoxEConfig) -> int:
    return _fitting_width(config, lambda width: _xlstm_model(width, config, 1), step=8)


def _xlstm_model(width: int, config: MoxEConfig, length: int) -> nn.Module:
    """The official language model, first block sLSTM (with its feed-forward part, in plain torch), then five mLSTM."""
    xlstm = official_package()
    return xlstm.xLSTMLMModel(
        xlstm.xLSTMLMModelConfig(
            vocab_size=config.vocab_size,
            context_length=length,
            num_blocks=_XLSTM_BLOCKS,
            embedding_dim=width,
            slstm_at=[0],
            mlstm_block=xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig(num_heads=4)),
            slstm_block=xlstm.sLSTMBlockConfig(
                slstm=xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=4), feedforward=xlstm.FeedForwardConfig()
            ),
        )
    )


class ReleasedDesign(nn.Module):
    """Our architecture the way the authors' released code runs it: blocks of the official package, a loop over the
    experts, and every token a sequence of its own to its expert. The router is a plain softmax over the experts."""

    def __init__(self, config: MoxEConfig, length: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_ReleasedLayer(config, length, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, S] -> logits [B, S, V]."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class _ReleasedLayer(nn.Module):
    def __init__(self, config: MoxEConfig, length: int, layer: int) -> None:
        super().__init__()
        half = config.num_experts // 2
        self.num_experts_per_tok = config.num_experts_per_tok
        self.mixers = nn.ModuleList([_official_slstm(config, layer), _official_mlstm(config, length, layer)])
        self.router = nn.Linear(config.hidden_size, config.num_experts)
        self.experts = nn.ModuleList(
            [_official_mlstm(config, 1, layer) for _ in range(half)]
            + [_official_slstm(config, layer) for _ in range(half)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        for mixer in self.mixers:
            x = mixer(x)
        tokens = x.flatten(0, 1)
        weights, chosen = torch.softmax(self.router(tokens).float(), dim=-1).topk(self.num_experts_per_tok, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                y = expert(tokens[token].unsqueeze(1)).squeeze(1)  # the block adds its own input: h + f(h)
                out.index_add_(0, token, (weights[token, slot, None] * y).to(out.dtype))
        return out.view_as(x)


def _official_mlstm(config: MoxEConfig, length: int, layer: int) -> nn.Module:
    xlstm = official_package()
    cell = xlstm.mLSTMLayerConfig(
        conv1d_kernel_size=config.conv_kernel_size,
        qkv_proj_blocksize=config.qkv_block_size,
        num_heads=config.num_heads,
        proj_factor=config.mlstm_expansion,
        embedding_dim=config.hidden_size,
        context_length=length,
    )
    return xlstm.mLSTMBlock(xlstm.mLSTMBlockConfig(mlstm=cell, _num_blocks=config.num_hidden_layers, _block_idx=layer))


def _official_slstm(config: MoxEConfig, layer: int) -> nn.Module:
    xlstm = official_package()
    cell = xlstm.sLSTMLayerConfig(
        embedding_dim=config.hidden_size,
        num_heads=config.num_heads,
        conv1d_kernel_size=config.conv_kernel_size,
        backend="vanilla",
    )
    feed_forward = xlstm.FeedForwardConfig(
        proj_factor=config.slstm_ffn_expansion, act_fn="swish", embedding_dim=config.hidden_size
    )
    blocks = {"_num_blocks": config.num_hidden_layers, "_block_idx": layer}
    return xlstm.sLSTMBlock(xlstm.sLSTMBlockConfig(slstm=cell, feedforward=feed_forward, **blocks))


def _next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _fitting_width(config: MoxEConfig, make: Callable[[int], nn.Module], *, step: int) -> int:
    """The multiple of `step` that brings a model nearest to the non-embedding parameters of our `config`."""

    def count(make_model: Callable[[int], nn.Module], width: int) -> int:
        with torch.device("meta"):
            return non_embedding_parameters(make_model(width))

    target = count(lambda _: MoxEForCausalLM(config), 0)
    low, high = step, 2 * step
    while count(make, high) < target:
        low, high = high, 2 * high
    while high - low > step:
        middle = (low + high) // (2 * step) * step
        low, high = (middle, high) if count(make, middle) < target else (low, middle)
    return min((low, high), key=lambda width: abs(count(make, width) - target))
