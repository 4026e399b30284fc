"""Equations 5 to 9 and the odds identity (23) to (43), each computed here from the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moxe.modules.router import Router
from tests.models.tiny import scramble
from tests.modules.comparison import assert_equal

TOKENS, HIDDEN, EXPERTS, K = 13, 8, 6, 3
GROUP_M, GROUP_S = slice(0, 3), slice(3, 6)


def make_router(**settings: Any) -> Router:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_experts": EXPERTS,
        "num_experts_per_tok": K,
        "router_kind": "entropy",
        "bias_kind": "standard",
        "gamma": 0.7,
        "difficulty_threshold": 0.5,
        "router_bias": True,
        "load_balancing": "loss",
    }
    router = Router(**{**defaults, **settings})
    scramble(router, scale=1.0)
    return router.double()


def tokens() -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def unbiased_by_hand(router: Router, h: Tensor) -> Tensor:
    z = h @ router.get_parameter("weight").T
    return z if router.bias is None else z + router.bias


def test_equation_05_difficulty_is_the_sigmoid_of_a_linear_map():
    router, h = make_router(), tokens()
    weight, bias = router.get_parameter("difficulty_weight"), router.get_parameter("difficulty_bias")
    expected = [1 / (1 + torch.exp(-(torch.dot(weight, token) + bias))) for token in h]
    difficulty = router(h).difficulty
    assert_equal(difficulty, torch.cat(expected))
    assert ((difficulty > 0) & (difficulty < 1)).all()


def test_equation_06_the_bias_lifts_group_m_by_gamma_d_and_lowers_group_s_by_as_much():
    routing = make_router(gamma=0.7)(tokens())
    bias = routing.logits - routing.unbiased_logits
    for e in range(EXPERTS):
        assert_equal(bias[:, e], (0.7 if e < EXPERTS // 2 else -0.7) * routing.difficulty)


@pytest.mark.parametrize("kind", ["proportional", "masked"])
def test_equation_06_the_two_other_shapes_of_the_bias_begin_at_the_threshold(kind: str):
    routing = make_router(bias_kind=kind, gamma=1.3, difficulty_threshold=0.6)(tokens())
    above = routing.difficulty > 0.6
    assert above.any()
    assert not above.all()
    bias = routing.logits - routing.unbiased_logits
    for t, d in enumerate(routing.difficulty.tolist()):
        strength = 0.0 if d <= 0.6 else 1.3 * (d - 0.6 if kind == "proportional" else d)
        assert_equal(bias[t], torch.tensor([strength] * 3 + [-strength] * 3, dtype=torch.float64))


@pytest.mark.parametrize("router_bias", [True, False])
def test_equation_07_adjusted_logits_are_a_linear_map_plus_the_bias(router_bias: bool):
    router, h = make_router(router_bias=router_bias), tokens()
    routing = router(h)
    sign = torch.tensor([1.0] * 3 + [-1.0] * 3, dtype=torch.float64)
    assert (router.bias is not None) == router_bias
    assert_equal(routing.unbiased_logits, unbiased_by_hand(router, h))
    assert_equal(routing.logits, unbiased_by_hand(router, h) + 0.7 * routing.difficulty[:, None] * sign)


def test_equation_08_and_09_weights_are_the_largest_probabilities_renormalised_to_one():
    routing = make_router()(tokens())
    for t in range(TOKENS):
        p = torch.exp(routing.logits[t]) / torch.exp(routing.logits[t]).sum()
        largest = sorted(range(EXPERTS), key=lambda e, p=p: -p[e])[:K]
        weight = dict(zip(routing.expert_indices[t].tolist(), routing.expert_weights[t], strict=True))
        assert set(weight) == set(largest)
        for e in largest:
            assert_equal(weight[e], p[e] / p[largest].sum())
    assert_equal(routing.expert_weights.sum(-1), torch.ones(TOKENS, dtype=torch.float64))


@pytest.mark.parametrize("gamma", [0.0, 0.7, 5.0])
def test_equations_23_to_43_the_odds_of_group_m_are_exp_2_gamma_d_times_the_raw_odds(gamma: float):
    routing = make_router(gamma=gamma)(tokens())
    p = torch.softmax(routing.logits, -1)
    odds = p[:, GROUP_M].sum(-1) / p[:, GROUP_S].sum(-1)
    raw = torch.exp(routing.unbiased_logits)
    assert_equal(odds, torch.exp(2 * gamma * routing.difficulty) * raw[:, GROUP_M].sum(-1) / raw[:, GROUP_S].sum(-1))


def test_equations_23_to_43_with_balanced_raw_logits_the_odds_are_exp_2_gamma_d():
    router = make_router()
    with torch.no_grad():
        router.weight[GROUP_S] = router.weight[GROUP_M].flip(0)
        router.get_parameter("bias")[GROUP_S] = router.get_parameter("bias")[GROUP_M].flip(0)
    routing = router(tokens())
    p = torch.softmax(routing.logits, -1)
    odds = p[:, GROUP_M].sum(-1) / p[:, GROUP_S].sum(-1)
    assert_equal(odds, torch.exp(2 * 0.7 * routing.difficulty))


def test_the_standard_router_has_no_difficulty_and_no_bias():
    router, h = make_router(router_kind="standard"), tokens()
    routing = router(h)
    assert routing.difficulty is None
    assert_equal(routing.logits, unbiased_by_hand(router, h))
    assert set(router.state_dict()) == {"weight", "bias"}


def test_a_balancing_bias_moves_the_choice_and_neither_weights_nor_logits():
    router, plain, h = make_router(load_balancing="bias"), make_router(), tokens()
    assert router.balancing_bias is not None
    assert "balancing_bias" in router.state_dict()
    assert "balancing_bias" not in {**dict(router.named_parameters()), **plain.state_dict()}
    assert (router.balancing_bias == 0).all()
    assert torch.equal(router(h).expert_indices, plain(h).expert_indices)
    router.balancing_bias[:] = torch.tensor([0.4, -0.4, 0.1, 0.0, -0.2, 0.3])
    routing, others = router(h), plain(h)
    assert_equal(routing.logits, others.logits)
    assert (routing.expert_indices.sort(-1).values != others.expert_indices.sort(-1).values).any()
    p = torch.softmax(plain(h).logits, -1)
    scores = (p.detach() + router.balancing_bias).tolist()
    for t in range(TOKENS):
        largest = sorted(range(EXPERTS), key=lambda e, score=scores[t]: -score[e])[:K]
        assert routing.expert_indices[t].tolist() == largest
        assert_equal(routing.expert_weights[t], p[t, largest] / p[t, largest].sum())
    weights = p.gather(-1, routing.expert_indices)
    expected = (weights / weights.sum(-1, keepdim=True) * torch.arange(K)).sum()
    ours = torch.autograd.grad((routing.expert_weights * torch.arange(K)).sum(), list(router.parameters()))
    theirs = torch.autograd.grad(expected, list(plain.parameters()))
    for actual, wanted in zip(ours, theirs, strict=True):
        assert_equal(actual, wanted)


def test_weights_are_finite_where_the_bias_chooses_experts_whose_probabilities_are_all_zero():
    router = make_router(load_balancing="bias")
    assert router.bias is not None
    assert router.balancing_bias is not None
    with torch.no_grad():
        router.bias[:] = torch.tensor([1e4, -1e4, -1e4, -1e4, -1e4, 1e4])
    router.balancing_bias[:] = torch.tensor([-3.0, 0, 0, 0, 0, -3.0])
    routing = router(tokens())
    assert not ((routing.expert_indices == 0) | (routing.expert_indices == 5)).any()
    assert_equal(routing.expert_weights.sum(-1), torch.ones(TOKENS, dtype=torch.float64))


def test_the_router_computes_in_float32_under_autocast():
    router, h = make_router().float(), tokens().float()
    exact = router(h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(h)
    assert routing.logits.dtype == routing.expert_weights.dtype == torch.float32
    torch.testing.assert_close(routing.logits, exact.logits, rtol=0, atol=0)
    torch.testing.assert_close(routing.expert_weights, exact.expert_weights, rtol=0, atol=0)


def test_the_choice_of_experts_sends_gradients_to_router_and_tokens_through_the_weights():
    router, h = make_router(), tokens().requires_grad_()
    weights = router(h).expert_weights
    found = torch.autograd.grad((weights * torch.arange(K)).sum(), [h, *router.parameters()])
    assert all((gradient != 0).all() for gradient in found)
