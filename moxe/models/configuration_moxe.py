"""Configuration of a MoxE model.

Names are those of docs/equations.md. Every default of the model is written here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterable
from typing import Any, Literal, TypeGuard, get_args

from transformers import PreTrainedConfig

from moxe.errors import shown

ExpertKind = Literal["xlstm", "mlstm", "slstm", "ffn"]
ExpertMemory = Literal["sequence", "token"]
SharedExpert = Literal["none", "ffn", "mlstm", "slstm"]
RouterKind = Literal["entropy", "standard"]
BiasKind = Literal["standard", "proportional", "masked"]
GroupLossKind = Literal["kl", "squared_difference", "squared_distance", "jensen_shannon"]
DifficultyTarget = Literal["router_entropy", "token_loss"]
LoadBalancing = Literal["loss", "bias"]
BackendName = Literal["auto", "reference", "torch", "cpu"]

_CHOICES = {
    "expert_kind": get_args(ExpertKind),
    "expert_memory": get_args(ExpertMemory),
    "shared_expert": get_args(SharedExpert),
    "router_kind": get_args(RouterKind),
    "bias_kind": get_args(BiasKind),
    "group_loss_kind": get_args(GroupLossKind),
    "difficulty_target": get_args(DifficultyTarget),
    "load_balancing": get_args(LoadBalancing),
    "backend": get_args(BackendName),
}
# The largest size of each, far beyond any model, so that no product of them overflows where memory is asked for.
LARGEST_NUM_LAYERS = 2**10
_LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "num_hidden_layers": LARGEST_NUM_LAYERS,
    "num_heads": 2**17,
    "num_experts": 2**14,
    "num_experts_per_tok": 2**14,
    "mlstm_per_slstm": 2**10,
    "conv_kernel_size": 2**16,
    "qkv_block_size": 2**23,
    "mlstm_expansion": 64,
    "mlstm_ffn_expansion": 64,
    "slstm_ffn_expansion": 64,
    "ffn_expansion": 64,
}
_POSITIVE = ("mlstm_expansion", "slstm_ffn_expansion", "ffn_expansion", "norm_eps")
_NOT_NEGATIVE = (
    "mlstm_ffn_expansion",
    "gamma",
    "difficulty_threshold",
    "difficulty_loss_coef",
    "group_loss_coef",
    "router_z_loss_coef",
    "load_balancing_loss_coef",
    "balancing_bias_rate",
)
_SIZES = tuple(name for name in _LARGEST if name not in (*_POSITIVE, *_NOT_NEGATIVE))
_YES_OR_NO = ("ffn_residual", "detach_difficulty_target", "router_bias", "tie_word_embeddings", "use_cache")
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
# What transformers itself passes to a configuration beside the declared fields.
PASSED_BY_TRANSFORMERS = {
    "model_type",
    "name_or_path",
    "torch_dtype",
    "attn_implementation",
    "experts_implementation",
    "output_attentions",
    "num_labels",
}


class RecurrentConfig(PreTrainedConfig):
    """What the configurations of models made of xLSTM blocks share: they refuse what no model of theirs can have."""

    def __post_init__(self, **kwargs):
        unknown = [name for name in kwargs if name not in PASSED_BY_TRANSFORMERS and not name.startswith("_")]
        if unknown:
            raise ValueError(unknown_name_message(unknown[0], type(self)))
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        own = self.setting_names()
        for name in _of(own, _CHOICES):
            value = getattr(self, name)
            if value not in _CHOICES[name]:
                raise ValueError(f"{name}={shown(value)} is not one of: {', '.join(_CHOICES[name])}")
        for name in _of(own, _SIZES):
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise ValueError(f"{name}={shown(value)} must be a whole number of at least 1")
        for name in _of(own, (*_POSITIVE, *_NOT_NEGATIVE)):
            value = getattr(self, name)
            lowest = "above 0" if name in _POSITIVE else "at least 0"
            in_range = isinstance(value, int | float) and (value > 0 or (value == 0 and name in _NOT_NEGATIVE))
            if not in_range or value == float("inf"):
                raise ValueError(f"{name}={shown(value)} must be a finite number {lowest}")
        for name in _of(own, _LARGEST):
            if getattr(self, name) > _LARGEST[name]:
                raise ValueError(f"{name}={shown(getattr(self, name))} must be at most {_LARGEST[name]}")
        for name in _of(own, _YES_OR_NO):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be true or false")
        for name in _TOKEN_IDS:
            value = getattr(self, name)
            tokens = value if isinstance(value, list) and name == "eos_token_id" else [value]
            if value is not None and not all(_is_whole(token) and abs(token) < 2**63 for token in tokens):
                raise ValueError(f"{name}={shown(value)} must be the number of a token, or null")
        self._check_divides("hidden_size", "num_heads")
        self._check_divides("mlstm_inner_size", "num_heads")
        self._check_divides("mlstm_inner_size", "qkv_block_size")

    def _check_divides(self, name: str, divisor_name: str) -> None:
        value, divisor = getattr(self, name), getattr(self, divisor_name)
        if value % divisor:
            raise ValueError(f"{name}={value} is not divisible by {divisor_name}={divisor}")

    @property
    def mlstm_inner_size(self) -> int:
        """Width of the mLSTM cell: `mlstm_expansion` x D."""
        sizes: Any = self
        return round(sizes.mlstm_expansion * sizes.hidden_size)

    @property
    def slstm_ffn_size(self) -> int:
        """Width of the sLSTM block's feed-forward part, rounded up to a multiple of 64."""
        sizes: Any = self
        return _round_up(sizes.slstm_ffn_expansion * sizes.hidden_size, 64)

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        """The names a recipe's `model` section may set: the fields this class declares itself."""
        inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
        return tuple(field.name for field in dataclasses.fields(cls) if field.name not in inherited)


class MoxEConfig(RecurrentConfig):
    """Sizes, routing and losses of a Mixture of xLSTM Experts.

    Args:
        vocab_size: number of tokens V.
        hidden_size: width D of the residual stream; divisible by `num_heads`.
        num_hidden_layers: MoxE layers (each: an sLSTM block, an mLSTM block, the experts).
        num_heads: heads H of every cell, in mixers and in experts.
        num_experts: experts E, even; the first half is group M, the second half group S.
        num_experts_per_tok: experts k that a token is sent to, 1 <= k <= E.
        expert_kind: `xlstm` (group M mLSTM, group S sLSTM), or one kind for all experts: `mlstm`, `slstm`, `ffn`.
        expert_memory: `sequence`: an expert carries its state along the tokens routed to it; `token`: every token
            meets an empty memory (the behaviour of the released code).
        shared_expert: kind of an expert beside the chosen k that sees every token, y = h + sum_k w_k f_k(h) +
            f_shared(h): `ffn`, `mlstm` or `slstm`, of the size of a routed one; or `none`. It carries its state along
            the whole sequence, whatever `expert_memory` is.
        router_kind: `entropy` (difficulty and modulation bias, equations 5 to 8) or `standard` (neither).
        bias_kind: shape of the modulation bias: `standard` gamma*d (6), `proportional` gamma*relu(d - threshold),
            `masked` gamma*d*[d > threshold].
        gamma: scale of the modulation bias, >= 0.
        difficulty_threshold: threshold of the `proportional` and `masked` bias.
        router_bias: whether the router's linear map has a bias.
        group_loss_kind: `kl` (18), `squared_difference`, `squared_distance` or `jensen_shannon`.
        difficulty_target: what the difficulty is trained on: `router_entropy`, that of the unbiased logits (11);
            `token_loss`, the cross-entropy of the next token as a fraction of log V, at most 1 and without a gradient,
            over the tokens that have a target.
        detach_difficulty_target: whether no gradient flows into the router's entropy, so that the router is not trained
            to match its own difficulty.
        difficulty_loss_coef, group_loss_coef, router_z_loss_coef, load_balancing_loss_coef: the lambdas of (21).
        load_balancing: `loss`, equation 20 as a term of the loss; or `bias`, without that term: a bias for each expert,
            added to the probabilities for the choice of the k experts alone, that `update_balancing_bias` raises for
            experts with too few tokens and lowers for those with too many after each step (Wang et al., 2024).
        balancing_bias_rate: what the bias of an expert changes by in a step.
        conv_kernel_size: taps of the causal depthwise convolution.
        qkv_block_size: block size of the block-diagonal q, k, v projections of the mLSTM block.
        mlstm_expansion: inner width of the mLSTM block as a multiple of D.
        mlstm_ffn_expansion: width of a gated feed-forward part behind the cell of mLSTM experts (not of the mixers), as
            sLSTM blocks have one, as a multiple of D; 0: none, as in the paper.
        slstm_ffn_expansion: width of the sLSTM block's gated feed-forward part as a multiple of D.
        ffn_expansion: width of a feed-forward expert (`expert_kind="ffn"`) as a multiple of D. The default gives it
            the mean parameter count of an mLSTM and an sLSTM expert.
        ffn_residual: whether a feed-forward expert is a pre-norm residual block; false: as released, neither norm nor
            residual, y = sum_k w_k FFN_k(h), for `expert_kind="ffn"` alone.
        norm_eps: epsilon of every normalisation.
        tie_word_embeddings: share the embedding with the language-model head.
        backend: implementation of the two cells: `auto`, `reference`, `torch`,
            `cpu` (C++, compiled on first use).
        use_cache: whether a forward pass without labels returns its recurrent state by default.

    Raises:
        ValueError: for an unknown name, a size out of range or sizes that do not divide, naming the value.
    """

    model_type = "moxe"
    # Beside the logits; what transformers' Trainer leaves out of its predictions.
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "cache_params",
        "lm_loss",
        "difficulty_loss",
        "group_loss",
        "z_loss",
        "load_balancing_loss",
        "routing",
    ]

    vocab_size: int = 49152
    hidden_size: int = 640
    num_hidden_layers: int = 10
    num_heads: int = 4
    num_experts: int = 8
    num_experts_per_tok: int = 2
    expert_kind: str = "xlstm"
    expert_memory: str = "sequence"
    shared_expert: str = "none"
    router_kind: str = "entropy"
    bias_kind: str = "standard"
    gamma: float = 0.7
    difficulty_threshold: float = 0.5
    router_bias: bool = True
    group_loss_kind: str = "kl"
    difficulty_target: str = "router_entropy"
    detach_difficulty_target: bool = False
    difficulty_loss_coef: float = 0.01
    group_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    load_balancing_loss_coef: float = 0.01
    load_balancing: str = "loss"
    balancing_bias_rate: float = 0.001
    conv_kernel_size: int = 4
    qkv_block_size: int = 16
    mlstm_expansion: float = 2.0
    mlstm_ffn_expansion: float = 0.0
    slstm_ffn_expansion: float = 1.7
    ffn_expansion: float = 2.2
    ffn_residual: bool = True
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    backend: str = "auto"
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def num_residual_blocks(self) -> int:
        """Blocks that add to the residual stream, one behind the other: in a layer two mixers and the experts."""
        return 3 * self.num_hidden_layers

    def _check(self) -> None:
        super()._check()
        if self.num_experts % 2:
            raise ValueError(
                f"num_experts={self.num_experts} is odd: half of the experts form group M and half group S, so it "
                "must be even"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than num_experts={self.num_experts}"
            )
        if not self.ffn_residual and self.expert_kind != "ffn":
            raise ValueError(
                f"ffn_residual=False is for feed-forward experts: with it expert_kind={self.expert_kind!r} must be ffn"
            )

    @property
    def mlstm_ffn_size(self) -> int:
        """Width of the mLSTM expert's feed-forward part, rounded up to a multiple of 64; 0: it has none."""
        return _round_up(self.mlstm_ffn_expansion * self.hidden_size, 64)

    @property
    def ffn_size(self) -> int:
        """Width of a feed-forward expert, rounded up to a multiple of 64."""
        return _round_up(self.ffn_expansion * self.hidden_size, 64)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _of(own: Collection[str], names: Iterable[str]) -> list[str]:
    """Those of `names` that a configuration has."""
    return [name for name in names if name in own]


def unknown_name_message(name: str, owner: type[RecurrentConfig]) -> str:
    """One sentence that refuses `name` and offers the nearest valid one."""
    names = owner.setting_names()
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid names: {', '.join(names)}"
    return f"{owner.__name__} has no setting {name!r}: {hint}"


def _round_up(value: float, multiple: int) -> int:
    whole = round(value)
    return -(-whole // multiple) * multiple
