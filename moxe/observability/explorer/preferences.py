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
from scipy import special, stats

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
    """

    token_id: int
    chosen: int
    occurrences: int


@dataclass(frozen=True)
class Preferences:
    """What one expert likes.

    Args:
        part: p, the part of all tokens that it receives.
        likings: at most `LIKINGS`, the surest first.
    """

    part: float
    likings: list[Liking]


def preferences(token_ids: Ints, experts: Ints, num_experts: int) -> list[Preferences]:
    """What each of the E experts of a layer likes.

    Args:
        token_ids: [M] the tokens.
        experts: [M, K] the experts that each went to, all different.
        num_experts: E.
    """
    distinct, place = np.unique(token_ids, return_inverse=True)
    occurrences = np.bincount(place)
    return [_of_expert(distinct, place, occurrences, (experts == e).any(1), num_experts) for e in range(num_experts)]


def _of_expert(distinct: Ints, place: Ints, occurrences: Ints, is_received: Ints, num_experts: int) -> Preferences:
    chosen = np.bincount(place[is_received], minlength=len(distinct))
    part = is_received.mean()
    log_chance = stats.binom.logsf(chosen - 1, occurrences, part) + math.log(len(distinct) * num_experts)
    found = np.flatnonzero(log_chance < math.log(_CHANCE))
    # Ordered by n KL(chosen / n || p), the exponent of that chance, which is too small for a number where n is large.
    share = chosen / occurrences
    exponent = occurrences * (special.rel_entr(share, part) + special.rel_entr(1 - share, 1 - part))
    surest = found[np.argsort(-exponent[found], kind="stable")][:LIKINGS]
    return Preferences(float(part), [Liking(int(distinct[i]), int(chosen[i]), int(occurrences[i])) for i in surest])
