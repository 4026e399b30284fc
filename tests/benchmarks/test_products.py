"""The products of a training step, against counts by hand and against what the size table counts in its own way."""

from __future__ import annotations

import pytest

from moxe.benchmarks.products import PASSES, Product, forward_cell_flops, forward_products, training_flops
from moxe.models.accounting import flops_per_token
from moxe.models.configuration_moxe import MoxEConfig

ROWS, LENGTH = 3, 8
TOKENS = ROWS * LENGTH


def config(**changes) -> MoxEConfig:
    sizes = {
        "vocab_size": 10,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "qkv_block_size": 4,
    }
    return MoxEConfig(**{**sizes, **changes})


def by_part(products: list[Product]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for product in products:
        totals[product.part] = totals.get(product.part, 0) + product.flops
    return totals


def test_a_product_counts_multiplications_and_additions():
    assert Product("head", rows=3, inner=5, columns=7, times=2).flops == 2 * 3 * 5 * 7 * 2


def test_the_products_of_each_part_are_those_counted_by_hand():
    # D 8, I 16, F 64 (1.7 x 8, rounded up to 64), H 2, blocks of 4; 2 layers; 2 of 4 experts a token.
    mlstm = 8 * 32 + 3 * 16 * 4 + 48 * 4 + 16 * 8  # up; q, k, v; gates; down
    slstm = 8 * 16 + 8 * 128 + 64 * 8  # four gates block-diagonal: 2 heads of 4 x 16; feed-forward part up, down
    assert by_part(forward_products(config(), ROWS, LENGTH)) == {
        "slstm mixers": 2 * TOKENS * 2 * slstm,
        "mlstm mixers": 2 * TOKENS * 2 * mlstm,
        "routers": 2 * TOKENS * 2 * 8 * (4 + 1),
        # Of each kind 2 experts, each with half of the tokens.
        "mlstm experts": 2 * TOKENS * 2 * mlstm,
        "slstm experts": 2 * TOKENS * 2 * slstm,
        "head": 2 * TOKENS * 8 * 10,
    }


def test_the_cells_take_the_cheaper_of_their_forms():
    # Dm 8: recurrent 4 x 64 = 256 a head; parallel over 8 tokens 2 x 9 x 8 = 144, over the experts' 4: 2 x 5 x 8 = 80.
    assert forward_cell_flops(config(), ROWS, LENGTH) == {
        "slstm mixers": 2 * TOKENS * 8 * 8 * 4,
        "slstm experts": 2 * TOKENS * 8 * 8 * 4,
        "mlstm mixers": 2 * TOKENS * 2 * 144,
        "mlstm experts": 2 * TOKENS * 2 * 80,
    }
    long = forward_cell_flops(config(), 1, 1000)
    assert long["mlstm mixers"] == 2 * 1000 * 2 * 256


def test_a_training_step_is_three_forward_passes():
    small = config()
    forward = sum(p.flops for p in forward_products(small, ROWS, LENGTH))
    assert training_flops(small, ROWS, LENGTH) == PASSES * (
        forward + sum(forward_cell_flops(small, ROWS, LENGTH).values())
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts_per_tok": 1},
        {"router_kind": "standard"},
        {"hidden_size": 64, "num_heads": 4, "vocab_size": 99},
    ],
)
def test_products_with_weights_agree_with_the_size_table(changes: dict):
    changed = config(**changes)
    products = sum(product.flops for product in forward_products(changed, ROWS, LENGTH))
    table = flops_per_token(changed)
    assert products == TOKENS * sum(part.projections for part in table.by_part.values())


def test_experts_of_one_kind_are_refused():
    with pytest.raises(ValueError, match="expert_kind='mlstm' is not counted here"):
        forward_products(config(expert_kind="mlstm"), ROWS, LENGTH)
