"""What an expert likes: counts as a plain loop counts them, and nothing where the router draws by lot."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moxe.observability.explorer.preferences import LIKINGS, Liking, Preferences, preferences

EXPERTS, K = 4, 2


def by_lot(tokens: int, types: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [M] and two different experts for each [M, 2]."""
    generator = np.random.default_rng(seed)
    first = generator.integers(EXPERTS, size=tokens)
    second = (first + generator.integers(1, EXPERTS, size=tokens)) % EXPERTS
    return generator.integers(types, size=tokens) * 7, np.stack([first, second], axis=1)


def likings_of(token_ids: np.ndarray, experts: np.ndarray) -> list[list[Liking]]:
    return [one.likings for one in preferences(token_ids, experts, EXPERTS)]


def test_a_token_that_always_goes_to_one_expert_is_what_it_likes_with_its_counts():
    token_ids, experts = by_lot(4000, types=10, seed=0)
    experts[token_ids == 21] = [3, 0]
    found = preferences(token_ids, experts, EXPERTS)
    occurrences = int((token_ids == 21).sum())
    for expert in (0, 3):
        part = sum(expert in pair for pair in experts.tolist()) / len(experts)
        assert found[expert] == Preferences(part, [Liking(21, occurrences, occurrences)])
    assert 21 not in [liking.token_id for liking in found[1].likings + found[2].likings]


@pytest.mark.parametrize("seed", range(10))
def test_experts_that_take_tokens_as_they_come_like_none(seed: int):
    token_ids, experts = by_lot(2000, types=50, seed=seed)
    assert likings_of(token_ids, experts) == [[]] * EXPERTS


def test_a_liking_is_what_chance_brings_to_less_than_one_pair_in_twenty():
    token_ids, experts = by_lot(2000, types=5, seed=1)
    rows = np.flatnonzero(token_ids == 14)
    experts[rows[: len(rows) // 2]] = [1, 0]  # more than half of them, beside those that chance sends there
    (liking,) = likings_of(token_ids, experts)[1]
    part = (experts == 1).any(1).mean()
    n, chosen = liking.occurrences, liking.chosen
    chance = sum(math.comb(n, x) * part**x * (1 - part) ** (n - x) for x in range(chosen, n + 1))
    assert chance * 5 * EXPERTS < 0.05
    assert chosen == sum(1 in pair for pair in experts[rows].tolist())


def test_the_surest_come_first_and_no_more_than_are_shown():
    token_ids = np.repeat(np.arange(30), 10 * (1 + np.arange(30)))
    experts = np.stack([np.where(token_ids % 2, 0, 2), np.where(token_ids % 2, 1, 3)], axis=1)
    found = likings_of(token_ids, experts)
    assert [liking.token_id for liking in found[0]] == list(range(29, 9, -2))[:LIKINGS]
    assert [liking.token_id for liking in found[3]] == list(range(28, 8, -2))[:LIKINGS]


def test_the_surest_is_found_also_where_all_chances_are_too_small_for_a_number():
    ordinary = np.repeat(np.arange(2 * LIKINGS), 3000)
    token_ids = np.concatenate([ordinary, np.full(3000, 900), np.full(60_000, 901)])
    to_expert_0 = np.concatenate([np.arange(len(ordinary)) % 5 < 4, np.full(3000, True), np.full(60_000, False)])
    experts = np.where(to_expert_0[:, None], [0, 1], [2, 3])
    assert likings_of(token_ids, experts)[0][0] == Liking(900, 3000, 3000)


def test_an_expert_that_receives_nothing_or_everything_likes_nothing():
    token_ids = np.arange(40) % 4
    experts = np.tile([0, 1], (40, 1))
    assert likings_of(token_ids, experts) == [[]] * EXPERTS


def test_a_single_token_is_enough_to_count():
    assert likings_of(np.array([5]), np.array([[0, 1]])) == [[]] * EXPERTS
