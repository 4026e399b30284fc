"""What an expert likes: the tokens it receives more often than its load alone explains.

Legend: M tokens, E experts, K experts a token, V vocabulary.

An expert that takes tokens as they come receives each of the n occurrences of a token with the same probability p, its
part of all tokens. More occurrences than that are counted as a liking where chance would hardly bring so many:
P(X >= chosen) for X ~ Binomial(n, p), times the number of pairs of token and expert that were tried (Bonferroni), must
lie under 0.05. Occurrences in one text are not independent, so a liking that is barely found may be one of this text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from moxe.observability.estimates import Ints

LIKINGS = 10  # of an expert, the surest first
_CHANCE = 0.05


@dataclass(frozen=True)
class Liking:
    """A token that an expert receives more often than its load explains.

    Args:
        token_id: the token.
        chosen: how many of its occurrences the expert received.
        occurrences: how often it occurs.
        times: chosen / (occurrences p), how many times its part of all tokens the expert receives of this one.
    """

    token_id: int
    chosen: int
    occurrences: int
    times: float


def likings(token_ids: Ints, experts: Ints, num_experts: int) -> list[list[Liking]]:
    """For each of the E experts of a layer the tokens it likes, at most `LIKINGS`, the surest first.

    Args:
        token_ids: [M] the tokens.
        experts: [M, K] the experts that each went to, all different.
        num_experts: E.
    """
    distinct, place = np.unique(token_ids, return_inverse=True)
    occurrences = np.bincount(place)
    return [_of_expert(distinct, place, occurrences, (experts == e).any(1), num_experts) for e in range(num_experts)]


def _of_expert(distinct: Ints, place: Ints, occurrences: Ints, is_received: Ints, num_experts: int) -> list[Liking]:
    chosen = np.bincount(place[is_received], minlength=len(distinct))
    part = is_received.mean()
    log_chance = stats.binom.logsf(chosen - 1, occurrences, part) + math.log(len(distinct) * num_experts)
    found = np.flatnonzero(log_chance < math.log(_CHANCE))
    surest = found[np.argsort(log_chance[found], kind="stable")][:LIKINGS]
    return [
        Liking(int(distinct[i]), int(chosen[i]), int(occurrences[i]), float(chosen[i] / (occurrences[i] * part)))
        for i in surest
    ]
