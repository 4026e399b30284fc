"""Small-sample inference: t intervals, paired tests, equivalence, Holm's correction, what could have been found.

The unit of replication is the seed, so n is small and every interval is Student's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

ALPHA = 0.05  # of tests; intervals cover 1 - ALPHA
POWER = 0.8
# A spread below this part of the values is the rounding of numbers that are all the same.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% t-interval; without one, and without an sd, where n is 1.

    Args:
        n: values.
        mean: of them.
        low, high: the interval's ends.
        sd: standard deviation, with n - 1.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    sd: float | None


@dataclass(frozen=True)
class PairedTest:
    """A mean paired difference and what is known of it; p-values are None where they do not exist.

    Args:
        estimate: of the differences.
        p: two-sided paired t-test of a mean of 0.
        equivalence_p: two one-sided t-tests (TOST): the larger p of "mean <= -margin" and "mean >= margin".
        detectable: the smallest true difference that the two-sided test at 5% finds with 80% power, with this n and sd.
        why_untested: one value, or no variance at all; None if tested.
    """

    estimate: Estimate
    p: float | None = None
    equivalence_p: float | None = None
    detectable: float | None = None
    why_untested: str | None = None


def estimate(values: Sequence[float] | NDArray[np.float64]) -> Estimate:
    """Mean, interval and sd of at least one finite value."""
    data = np.asarray(values, dtype=np.float64)
    n, mean = len(data), float(data.mean())
    if n == 1:
        return Estimate(1, mean, None, None, None)
    sd = float(data.std(ddof=1))
    if sd <= _ROUNDING * float(np.abs(data).max()):
        return Estimate(n, mean, mean, mean, 0.0)
    half = float(stats.t.ppf(1 - ALPHA / 2, n - 1)) * sd / math.sqrt(n)
    return Estimate(n, mean, mean - half, mean + half, sd)


def paired_test(ours: Sequence[float], theirs: Sequence[float], margin: float) -> PairedTest:
    """Tests the mean of ours - theirs, paired, against 0 and against the margin.

    Args:
        ours, theirs: n >= 1 finite values each, paired by position.
        margin: differences below this do not matter; positive.
    """
    pairs = np.array([ours, theirs], dtype=np.float64)
    of_difference = estimate(pairs[0] - pairs[1])
    if of_difference.sd is None:
        return PairedTest(of_difference, why_untested="one seed has no spread to test against")
    # Differences of nearly equal numbers round by the size of the numbers, not of the differences.
    if of_difference.sd <= _ROUNDING * float(np.abs(pairs).max()):
        return PairedTest(of_difference, why_untested="the difference is the same for every seed")
    n, degrees = of_difference.n, of_difference.n - 1
    error = of_difference.sd / math.sqrt(n)
    return PairedTest(
        of_difference,
        p=float(2 * stats.t.sf(abs(of_difference.mean) / error, degrees)),
        equivalence_p=float(stats.t.sf((margin - abs(of_difference.mean)) / error, degrees)),
        detectable=detectable_difference(n, of_difference.sd),
    )


def detectable_difference(n: int, sd: float) -> float:
    """The true mean of n >= 2 differences of this sd at which a two-sided t-test at 5% has a power of 80%."""
    degrees = n - 1
    critical = stats.t.ppf(1 - ALPHA / 2, degrees)
    # The noncentral t, as a normal over an estimated sd (scipy.stats.nct is NaN for few degrees of freedom): the mean
    # over the quantiles of that sd, as a part of the true one.
    spread = np.sqrt(stats.chi2.ppf((np.arange(1000) + 0.5) / 1000, degrees) / degrees)

    def missing_power(noncentrality: float) -> float:
        found = special.ndtr(noncentrality - critical * spread) + special.ndtr(-noncentrality - critical * spread)
        return float(found.mean()) - POWER

    # Power rises with the noncentrality: 5% at 0, and above 80% at twice the critical value and more.
    noncentrality = optimize.root_scalar(missing_power, bracket=(0.0, 2 * critical + 4)).root
    return noncentrality * sd / math.sqrt(n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given: controls the family-wise error without assumptions."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        running = max(running, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, running)
    return adjusted
