"""The rows of the paper's tables, and ours beside them: which model each is, and what the paper reports of it.

Sections of rows: `table1`, the models of Table 1; `table2`, its ablations; `ours`, what readers of the ablations will
ask; `gamma`, a sweep of the bias; `options`, changes that the paper does not make.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

REFERENCE = "moxe"


@dataclass(frozen=True)
class Row:
    """One row of a table: a model of the scale with some settings changed.

    Args:
        name: as in folders and results.json.
        label: as in tables.
        section: which part of the tables it belongs to.
        model: the model of the scale that it starts from.
        learning_rate_of: the model of Table 1 whose learning rate it takes; "": `model` itself.
        settings: what it changes in the `model` section.
        note: what it is, in a sentence; may be empty.
        parameters: the paper's count of parameters.
        lambada_perplexity, change_percent: the paper's Table 2.
    """

    name: str
    label: str
    section: str
    model: str = "moxe"
    learning_rate_of: str = ""
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    note: str = ""
    parameters: int | None = None
    lambada_perplexity: float | None = None
    change_percent: float | None = None

    @property
    def tuned_as(self) -> str:
        """The model whose learning rate it takes."""
        return self.learning_rate_of or self.model


_NO_ENTROPY = {"router_kind": "standard"}

_MODELS = (
    Row("moxe", "MoxE", "table1", parameters=340_000_000, lambada_perplexity=65_213.61),
    Row("xlstm", "xLSTM[5:1]", "table1", model="xlstm", note="dense, of our own blocks", parameters=338_000_000),
    Row(
        "qwen2_moe",
        "Qwen1.5-MoE",
        "table1",
        model="qwen2_moe",
        note="transformers; its router loss on, at its own coefficient",
        parameters=350_000_000,
    ),
    Row(
        "gemma2",
        "Gemma 2",
        "table1",
        model="gemma2",
        note="transformers; eager attention, the only one that caps its scores",
        parameters=356_000_000,
    ),
    Row("llama", "Llama", "table1", model="llama", note="transformers; not in the paper"),
)

_ABLATIONS = (
    Row(
        "standard",
        "MoxE-Standard",
        "table2",
        settings=_NO_ENTROPY,
        note="no difficulty, no bias (γ = 0)",
        lambada_perplexity=348_908.14,
        change_percent=435,
    ),
    Row(
        "no-group-loss",
        "MoxE-No-Group-Loss",
        "table2",
        settings={"group_loss_coef": 0.0},
        lambada_perplexity=213_974.42,
        change_percent=228,
    ),
    Row(
        "ffn-released",
        "xLSTM-MoE",
        "table2",
        settings={"expert_kind": "ffn", "ffn_residual": False, **_NO_ENTROPY},
        note="feed-forward experts as released: neither norm nor residual; no entropy bias, group loss kept",
        lambada_perplexity=1_412_846.01,
        change_percent=2066,
    ),
    Row(
        "mlstm-experts",
        "mLSTM-MoxE",
        "table2",
        settings={"expert_kind": "mlstm", **_NO_ENTROPY},
        note="mLSTM experts only, no entropy bias, group loss kept",
        lambada_perplexity=85_963.85,
        change_percent=31.8,
    ),
    Row(
        "slstm-experts",
        "sLSTM-MoxE",
        "table2",
        settings={"expert_kind": "slstm", **_NO_ENTROPY},
        note="sLSTM experts only, no entropy bias, group loss kept",
        lambada_perplexity=191_161.87,
        change_percent=193,
    ),
)

_OURS = (
    Row(
        "xlstm-active",
        "xLSTM[5:1] of MoxE's active blocks",
        "ours",
        model="xlstm_active",
        learning_rate_of="xlstm",
        note="dense: MoxE's width, and as many blocks as a token of it meets; fewer parameters",
    ),
    Row(
        "token-memory",
        "experts without memory",
        "ours",
        settings={"expert_memory": "token"},
        note="every token meets an empty expert, as in the released code",
    ),
    Row(
        "ffn",
        "feed-forward experts, fair",
        "ours",
        settings={"expert_kind": "ffn", **_NO_ENTROPY},
        note="with norm and residual; no entropy bias, group loss kept",
    ),
    Row(
        "group-squared-difference",
        "group loss (P_M - P_S)²",
        "ours",
        settings={"group_loss_kind": "squared_difference"},
        note="twice the squared distance to one half",
    ),
    Row(
        "group-jensen-shannon",
        "group loss, Jensen-Shannon",
        "ours",
        settings={"group_loss_kind": "jensen_shannon"},
    ),
)

_GAMMA = tuple(
    Row(f"gamma-{gamma:g}", f"γ = {gamma:g}", "gamma", settings={"gamma": gamma}) for gamma in (0.0, 0.35, 1.4)
)

_OPTIONS = (
    Row(
        "mlstm-ffn",
        "feed-forward part in mLSTM experts",
        "options",
        settings={"mlstm_ffn_expansion": 1.7},
        note="gated, as sLSTM experts have; a quarter more parameters",
    ),
    Row(
        "token-loss-target",
        "difficulty of the token's own loss",
        "options",
        settings={"difficulty_target": "token_loss"},
        note="detached, instead of the router's entropy",
    ),
    Row(
        "detached-target",
        "entropy target without gradient",
        "options",
        settings={"detach_difficulty_target": True},
    ),
    Row(
        "shared-expert",
        "a shared feed-forward expert",
        "options",
        settings={"shared_expert": "ffn"},
        note="always on; more parameters and work",
    ),
    Row(
        "bias-balancing",
        "balanced by bias",
        "options",
        settings={"load_balancing": "bias"},
        note="in place of the auxiliary loss (20); group loss kept",
    ),
)

ROWS = (*_MODELS, *_ABLATIONS, *_OURS, *_GAMMA, *_OPTIONS)


def rows_of(table: str) -> tuple[Row, ...]:
    """The rows that a table (a key of `moxe.experiments.TABLES`) shows, the reference among them."""
    if table == "table1":
        return _MODELS
    if table == "figures":
        return (*_MODELS, *(row for row in _ABLATIONS if row.name == "no-group-loss"))
    return (_MODELS[0], *_ABLATIONS, *_OURS, *_GAMMA, *_OPTIONS)
