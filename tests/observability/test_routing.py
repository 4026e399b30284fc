"""Routing statistics against their definitions, over batches, masks and routers without a difficulty."""

from __future__ import annotations

import math

import pytest
import torch

from moxe.modules.router import RouterOutput
from moxe.observability.routing import RoutingMeter, routing_statistics


def random_routing(rows: int, tokens: int, experts: int = 6, chosen: int = 2, difficulty: bool = True) -> RouterOutput:
    logits = torch.randn(rows, tokens, experts) * 2
    top = logits.softmax(-1).topk(chosen, dim=-1)
    return RouterOutput(
        logits=logits,
        unbiased_logits=torch.randn(rows, tokens, experts) * 2,
        difficulty=torch.rand(rows, tokens) if difficulty else None,
        expert_indices=top.indices,
        expert_weights=top.values / top.values.sum(-1, keepdim=True),
    )


def test_statistics_are_those_of_a_plain_loop_over_tokens():
    torch.manual_seed(0)
    routing = random_routing(3, 5)
    (statistics,) = routing_statistics([routing], 6)
    counts, entropies = [0] * 6, []
    for row in range(3):
        for token in range(5):
            for expert in routing.expert_indices[row, token].tolist():
                counts[expert] += 1
            p = routing.unbiased_logits[row, token].double().softmax(-1).tolist()
            entropies.append(-sum(x * math.log(x) for x in p) / math.log(6))
    assert routing.difficulty is not None
    assert statistics.load == pytest.approx([count / 30 for count in counts])
    assert statistics.mlstm_share == pytest.approx(sum(counts[:3]) / 30)
    assert statistics.router_entropy == pytest.approx(sum(entropies) / 15, rel=1e-5)
    assert statistics.difficulty_mean == pytest.approx(routing.difficulty.mean().item(), rel=1e-5)
    assert statistics.difficulty_variance == pytest.approx(routing.difficulty.var(correction=0).item(), rel=1e-4)


def test_batches_of_unequal_size_count_by_their_tokens():
    torch.manual_seed(0)
    parts = [random_routing(1, 3), random_routing(4, 3)]
    joint = RouterOutput(
        *(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0]))  # type: ignore[arg-type]
    )
    meter = RoutingMeter(6)
    for part in parts:
        meter.add([part, part])
    (expected,) = routing_statistics([joint], 6)
    for statistics in meter.compute():
        assert statistics.load == pytest.approx(expected.load)
        assert statistics.difficulty_mean == pytest.approx(expected.difficulty_mean)
        assert statistics.difficulty_variance == pytest.approx(expected.difficulty_variance, rel=1e-4)
        assert statistics.router_entropy == pytest.approx(expected.router_entropy)


def test_padding_counts_for_nothing():
    torch.manual_seed(0)
    routing = random_routing(2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    padded = RouterOutput(
        routing.logits * mask[..., None],
        routing.unbiased_logits * mask[..., None],
        routing.difficulty * mask if routing.difficulty is not None else None,
        routing.expert_indices.masked_fill(mask[..., None] == 0, -1),
        routing.expert_weights * mask[..., None],
    )
    kept = mask.bool()
    packed = RouterOutput(
        *(getattr(routing, name)[kept].unsqueeze(0) for name in vars(routing))  # type: ignore[arg-type]
    )
    (with_padding,), (without) = routing_statistics([padded], 6, mask), routing_statistics([packed], 6)[0]
    assert with_padding.load == pytest.approx(without.load)
    assert with_padding.router_entropy == pytest.approx(without.router_entropy)
    assert with_padding.difficulty_mean == pytest.approx(without.difficulty_mean)


def test_uniform_and_certain_routers_have_entropy_one_and_zero():
    routing = random_routing(1, 4)
    uniform = torch.zeros_like(routing.logits)
    certain = torch.zeros_like(routing.logits)
    certain[..., 0] = 1000.0
    for logits, entropy in ((uniform, 1.0), (certain, 0.0)):
        changed = RouterOutput(logits, logits, routing.difficulty, routing.expert_indices, routing.expert_weights)
        assert routing_statistics([changed], 6)[0].router_entropy == pytest.approx(entropy, abs=1e-6)


def test_a_standard_router_has_no_difficulty():
    (statistics,) = routing_statistics([random_routing(1, 3, difficulty=False)], 6)
    assert statistics.difficulty_mean is None
    assert statistics.difficulty_variance is None


def test_a_difficulty_that_is_not_a_number_is_not_hidden():
    routing = random_routing(1, 3)
    assert routing.difficulty is not None
    routing.difficulty[0, 0] = math.nan
    (statistics,) = routing_statistics([routing], 6)
    assert math.isnan(statistics.difficulty_mean or 0)
    assert math.isnan(statistics.difficulty_variance or 0)


def test_a_reset_meter_starts_again():
    meter = RoutingMeter(6)
    meter.add([random_routing(1, 3)])
    meter.reset()
    assert meter.compute() == []
