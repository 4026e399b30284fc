"""Equations 10 to 20, each computed here from the paper."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moxe.modules.losses import (
    difficulty_loss,
    group_loss,
    hardness_of,
    load_balancing_loss,
    normalised_entropy,
    router_losses,
)
from moxe.modules.router import RouterOutput
from tests.modules.comparison import assert_equal

TOKENS, EXPERTS, K = 11, 6, 2


def decided(tokens: int = TOKENS, seed: int = 0) -> RouterOutput:
    """Logits, difficulty and choices that have nothing to do with one another."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    logits = torch.randn(tokens, EXPERTS, **draw)
    experts = torch.rand(tokens, EXPERTS, **draw).argsort(-1)[:, :K]
    return RouterOutput(
        logits=logits.requires_grad_(),
        unbiased_logits=torch.randn(tokens, EXPERTS, **draw).requires_grad_(),
        difficulty=torch.rand(tokens, **draw).requires_grad_(),
        expert_indices=experts,
        expert_weights=torch.full((tokens, K), 1 / K, dtype=torch.float64),
    )


def mass_of_groups(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    p_m = probabilities[:, : EXPERTS // 2].sum() / len(probabilities)
    return p_m, 1 - p_m


def test_equation_10_normalised_entropy_is_that_of_the_unbiased_logits_over_log_e():
    routing = decided()
    for t in range(TOKENS):
        p = torch.exp(routing.unbiased_logits[t]) / torch.exp(routing.unbiased_logits[t]).sum()
        expected = -torch.stack([p_e * torch.log(p_e) for p_e in p]).sum() / math.log(EXPERTS)
        assert_equal(normalised_entropy(routing.unbiased_logits)[t], expected)


def test_equation_10_is_one_for_equal_logits_and_zero_for_a_certain_choice():
    assert_equal(normalised_entropy(torch.zeros(1, EXPERTS).double()), torch.ones(1).double())
    certain = torch.tensor([[0.0, -1e4, -1e4, -1e4, -1e4, -1e4]], dtype=torch.float64)
    assert_equal(normalised_entropy(certain), torch.zeros(1).double())


def test_equation_11_difficulty_loss_is_the_mean_squared_distance_to_the_entropy():
    routing = decided()
    assert routing.difficulty is not None
    distances = [
        (routing.difficulty[t] - normalised_entropy(routing.unbiased_logits[t : t + 1])[0]) ** 2 for t in range(TOKENS)
    ]
    assert_equal(difficulty_loss(routing), sum(distances, torch.tensor(0.0).double()) / TOKENS)
    assert_equal(router_losses(routing, "kl").difficulty, difficulty_loss(routing))


def test_equation_11_trains_the_difficulty_and_the_unbiased_logits_and_never_looks_at_the_adjusted_ones():
    routing = decided()
    inputs = [routing.difficulty, routing.unbiased_logits, routing.logits]
    to_difficulty, to_unbiased, to_adjusted = torch.autograd.grad(
        difficulty_loss(routing), [x for x in inputs if x is not None], allow_unused=True
    )
    assert (to_difficulty != 0).all()
    assert (to_unbiased != 0).all()
    assert to_adjusted is None


def test_a_detached_entropy_is_the_same_target_and_trains_the_difficulty_alone():
    routing = decided()
    loss = difficulty_loss(routing, detach_target=True)
    assert_equal(loss, difficulty_loss(routing))
    assert_equal(router_losses(routing, "kl", detach_difficulty_target=True).difficulty, loss)
    assert routing.difficulty is not None
    to_difficulty, to_unbiased = torch.autograd.grad(
        loss, [routing.difficulty, routing.unbiased_logits], allow_unused=True
    )
    assert_equal(to_difficulty, torch.autograd.grad(difficulty_loss(routing), routing.difficulty)[0])
    assert to_unbiased is None


def test_the_token_loss_is_a_target_as_a_fraction_of_log_v_over_the_tokens_that_have_one():
    """Tokens 0 to 3 of 11 have none; some cost more than a uniform guess over V = 20, some less."""
    routing = decided()
    assert routing.difficulty is not None
    losses = torch.linspace(0.2, 5.0, TOKENS, dtype=torch.float64).requires_grad_()
    targets = torch.arange(TOKENS)
    targets[:4] = -100
    fractions = [min(loss / math.log(20), 1.0) for loss in losses[4:].tolist()]
    assert 0 < sum(fraction == 1 for fraction in fractions) < len(fractions)
    expected = sum(
        ((d - target) ** 2 for d, target in zip(routing.difficulty[4:], fractions, strict=True)),
        torch.tensor(0.0).double(),
    ) / len(fractions)
    loss = router_losses(routing, "kl", hardness=hardness_of(losses, targets, 20)).difficulty
    assert_equal(loss, expected)
    inputs = [routing.difficulty, routing.unbiased_logits, losses]
    to_difficulty, to_unbiased, to_losses = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert_equal(to_difficulty, torch.autograd.grad(expected, routing.difficulty)[0])
    assert to_unbiased is None
    assert to_losses is None


def test_without_any_target_the_difficulty_has_nothing_to_fit_and_its_loss_is_zero():
    routing, none = decided(), torch.full((TOKENS,), -100)
    assert difficulty_loss(routing, hardness=hardness_of(torch.zeros(TOKENS), none, 20)) == 0


def test_equations_12_to_18_group_loss_is_the_divergence_of_the_groups_mean_mass_from_one_half():
    probabilities = torch.softmax(decided().logits, -1)
    p_m, p_s = mass_of_groups(probabilities)
    expected = p_m * torch.log(2 * p_m) + p_s * torch.log(2 * p_s)
    assert_equal(group_loss(probabilities, "kl"), expected)


def test_equations_12_to_18_group_loss_is_a_mean_over_tokens_before_it_is_a_divergence():
    """Half of the tokens wholly in M and half wholly in S are balanced."""
    probabilities = torch.zeros(4, EXPERTS).double()
    probabilities[:2, 0] = probabilities[2:, -1] = 1
    assert_equal(group_loss(probabilities, "kl"), torch.tensor(0.0).double())


def test_equations_12_to_18_group_loss_is_log_2_when_one_group_has_all_the_mass():
    probabilities = torch.zeros(4, EXPERTS).double()
    probabilities[:, 1] = 1
    assert_equal(group_loss(probabilities, "kl"), torch.tensor(math.log(2), dtype=torch.float64))


def test_the_three_other_group_losses():
    probabilities = torch.softmax(decided().logits, -1)
    p_m, p_s = mass_of_groups(probabilities)
    assert_equal(group_loss(probabilities, "squared_difference"), (p_m - p_s) ** 2)
    assert_equal(group_loss(probabilities, "squared_distance"), (p_m - 0.5) ** 2 + (p_s - 0.5) ** 2)
    expected = torch.zeros((), dtype=torch.float64)
    for p in (p_m, p_s):
        middle = (p + 0.5) / 2
        expected = expected + (p * torch.log(p / middle) + 0.5 * torch.log(0.5 / middle)) / 2
    assert_equal(group_loss(probabilities, "jensen_shannon"), expected)


@pytest.mark.parametrize("kind", ["kl", "squared_difference", "squared_distance", "jensen_shannon"])
def test_every_group_loss_is_zero_in_balance_and_pulls_mass_out_of_the_heavier_group(kind: str):
    balanced = torch.full((3, EXPERTS), 1 / EXPERTS, dtype=torch.float64)
    assert_equal(group_loss(balanced, kind), torch.tensor(0.0).double())
    logits = torch.tensor([[1.0, 1, 1, 0, 0, 0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(group_loss(torch.softmax(logits, -1), kind), logits)
    assert (gradient[0, :3] > 0).all()
    assert (gradient[0, 3:] < 0).all()


def test_equation_19_router_z_loss_is_the_mean_squared_logsumexp_of_the_adjusted_logits():
    routing = decided()
    expected = torch.stack([torch.log(torch.exp(routing.logits[t]).sum()) ** 2 for t in range(TOKENS)]).mean()
    assert_equal(router_losses(routing, "kl").z, expected)


def test_equation_20_load_balancing_is_e_times_the_sum_of_fraction_times_mean_probability():
    routing = decided()
    p = torch.softmax(routing.logits, -1)
    expected = torch.zeros((), dtype=torch.float64)
    for e in range(EXPERTS):
        fraction = sum(int(e in chosen) for chosen in routing.expert_indices.tolist()) / (TOKENS * K)
        expected = expected + EXPERTS * fraction * p[:, e].mean()
    assert_equal(load_balancing_loss(p, routing.expert_indices), expected)
    assert_equal(router_losses(routing, "kl").load_balancing, expected)


def test_equation_20_is_one_when_uniform_and_e_over_k_when_collapsed():
    uniform = torch.full((EXPERTS, EXPERTS), 1 / EXPERTS, dtype=torch.float64)
    each_once = torch.stack([torch.arange(EXPERTS), (torch.arange(EXPERTS) + 1) % EXPERTS], -1)
    assert_equal(load_balancing_loss(uniform, each_once), torch.tensor(1.0).double())
    collapsed = torch.zeros(5, EXPERTS).double()
    collapsed[:, :2] = 0.5
    expected = torch.tensor(EXPERTS / 2).double()
    assert_equal(load_balancing_loss(collapsed, torch.tensor([[0, 1]] * 5)), expected)


def test_the_standard_router_has_a_difficulty_loss_of_zero():
    routing = decided()
    without = replace(routing, difficulty=None)
    assert router_losses(without, "kl").difficulty == 0


def test_without_any_token_all_four_losses_are_zero_and_not_nan():
    losses = router_losses(decided(tokens=0), "kl")
    assert all(x == 0 for x in (losses.difficulty, losses.group, losses.z, losses.load_balancing))
