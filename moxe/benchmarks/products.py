"""The matrix products of a training step, counted from the configuration; nothing is run.

Legend: N tokens of a step, S tokens a row, D hidden size, I inner size of an mLSTM block, F feed-forward width,
H heads, Q size of a diagonal block, E experts, K experts a token, V vocabulary; Dm = I / H and Ds = D / H head sizes.

The counts are a minimum: what any implementation has to multiply. Norms, gates, convolutions, activations, the
optimiser and everything else that is no matrix product take their time on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from moxe.models.configuration_moxe import MoxEConfig

# A product of the forward pass returns as two in the backward pass: for its input and for its weight.
PASSES = 3


@dataclass(frozen=True)
class Product:
    """`times` products of [rows, inner] with [inner, columns] in one forward pass."""

    part: str
    rows: float
    inner: int
    columns: int
    times: int = 1

    @property
    def flops(self) -> float:
        """A multiplication and an addition count one each."""
        return 2.0 * self.times * self.rows * self.inner * self.columns


def training_flops(config: MoxEConfig, rows: int, length: int) -> float:
    """FLOPs of all matrix products of a training step on [rows, length] tokens, cells included."""
    products = sum(product.flops for product in forward_products(config, rows, length))
    return PASSES * (products + sum(forward_cell_flops(config, rows, length).values()))


def forward_products(config: MoxEConfig, rows: int, length: int) -> list[Product]:
    """The products with weights in a forward pass; experts get equal shares, N K / E rows each.

    Raises:
        ValueError: for a configuration whose experts are all of one kind.
    """
    if config.expert_kind != "xlstm":
        raise ValueError(f"expert_kind={config.expert_kind!r} is not counted here, only 'xlstm'")
    tokens, hidden, experts, layers = rows * length, config.hidden_size, config.num_experts, config.num_hidden_layers
    an_expert = tokens * config.num_experts_per_tok / experts
    return [
        *_slstm_block("slstm mixers", config, tokens, layers),
        *_mlstm_block("mlstm mixers", config, tokens, layers),
        Product("routers", tokens, hidden, experts + (config.router_kind == "entropy"), layers),
        *_mlstm_block("mlstm experts", config, an_expert, layers * experts // 2),
        *_slstm_block("slstm experts", config, an_expert, layers * experts // 2),
        Product("head", tokens, hidden, config.vocab_size),
    ]


def _mlstm_block(part: str, config: MoxEConfig, rows: float, blocks: int) -> list[Product]:
    inner, diagonal = config.mlstm_inner_size, config.qkv_block_size
    return [
        Product(part, rows, config.hidden_size, 2 * inner, blocks),  # up
        Product(part, rows, diagonal, diagonal, 3 * blocks * inner // diagonal),  # q, k, v
        Product(part, rows, 3 * inner, 2 * config.num_heads, blocks),  # gates
        Product(part, rows, inner, config.hidden_size, blocks),  # down
    ]


def _slstm_block(part: str, config: MoxEConfig, rows: float, blocks: int) -> list[Product]:
    hidden, width, size = config.hidden_size, config.slstm_ffn_size, config.hidden_size // config.num_heads
    return [
        Product(part, rows, size, 4 * size, blocks * config.num_heads),  # i, f, z, o
        Product(part, rows, hidden, 2 * width, blocks),
        Product(part, rows, width, hidden, blocks),
    ]


def forward_cell_flops(config: MoxEConfig, rows: int, length: int) -> dict[str, float]:
    """FLOPs of the products inside the cells in a forward pass, by part.

    sLSTM, a token: R h for four gates, 8 D Ds.
    mLSTM, a token of a sequence of n tokens: the smaller of the parallel form, q k^T and its product with v over the
    tokens up to it, 2 (n + 1) Dm H in the mean, and the recurrent form, k v^T and C^T q, 4 Dm^2 H. A chunkwise form
    lies between or above. For an expert n is S K / E.
    """
    tokens = rows * length
    share = config.num_experts_per_tok / config.num_experts
    slstm = 8.0 * config.hidden_size * (config.hidden_size // config.num_heads)
    # Half of the experts are of each kind, each with its share of the tokens.
    routed = tokens * config.num_experts_per_tok / 2
    return {
        "slstm mixers": config.num_hidden_layers * tokens * slstm,
        "mlstm mixers": config.num_hidden_layers * tokens * _mlstm_token(config, length),
        "slstm experts": config.num_hidden_layers * routed * slstm,
        "mlstm experts": config.num_hidden_layers * routed * _mlstm_token(config, length * share),
    }


def _mlstm_token(config: MoxEConfig, length: float) -> float:
    size = config.mlstm_inner_size // config.num_heads
    return config.num_heads * min(2.0 * (length + 1) * size, 4.0 * size**2)
