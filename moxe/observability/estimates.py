"""Estimates from the tokens of a text, with intervals that know that neighbouring tokens are not independent.

The intervals are 95% percentile intervals of a cluster bootstrap: whole clusters of tokens are drawn with replacement,
so that whatever the tokens of a cluster share is drawn with them. Every statistic is a function of sums over tokens, so
that a thousand resamples are one product of matrices.

Legend: N tokens, G clusters, R resamples, C columns that are summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESAMPLES = 1000
LEVEL = 0.95
# Newton's method takes some five steps of its own; more where outcomes overlap in few tokens and the slope is steep.
NEWTON_STEPS = 100
NEWTON_PRECISION = 1e-12  # where the regressor has unit variance


@dataclass(frozen=True)
class Estimate:
    """A value of the whole text and its interval; `low` and `high` are None where a resample has no such value."""

    value: float
    low: float | None
    high: float | None

    @property
    def is_above_zero(self) -> bool:
        return self.low is not None and self.low > 0

    @property
    def is_below_zero(self) -> bool:
        return self.high is not None and self.high < 0

    def covers(self, value: float) -> bool:
        return self.low is not None and self.high is not None and self.low <= value <= self.high


def sums_by_group(groups: Ints, values: Floats, num_groups: int) -> Floats:
    """[num_groups] the sum of the `values` [N] of each of the `groups` [N]."""
    return np.bincount(groups, values, num_groups).astype(float, copy=False)


class ClusterBootstrap:
    """Draws the same resamples for every statistic that it is asked for."""

    def __init__(self, clusters: Ints, *, seed: int) -> None:
        """`clusters` [N]: the cluster of each token, from 0 to G - 1, each of them with at least one token."""
        self.clusters = clusters
        self.num_clusters = int(clusters.max()) + 1
        drawn = np.full(self.num_clusters, 1 / self.num_clusters)
        self.counts = (
            np.random.default_rng(seed).multinomial(self.num_clusters, drawn, RESAMPLES).astype(float)
        )  # [R, G]

    def of_sums(self, columns: Floats, statistic: Callable[[Floats], Floats]) -> list[Estimate | None]:
        """Estimate what depends on the tokens through sums alone, all resamples at once.

        Args:
            columns: [N, C], summed over the tokens of a resample.
            statistic: from sums [..., C] to M statistics [..., M], NaN where there is none.

        Returns:
            M estimates, None where the whole text does not have the statistic.
        """
        of_clusters = np.stack([sums_by_group(self.clusters, column, self.num_clusters) for column in columns.T], 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            values, resampled = statistic(columns.sum(0)), statistic(self.counts @ of_clusters)
        return [_estimate(value, resampled[:, index]) for index, value in enumerate(values)]


def _estimate(value: float, resampled: Floats) -> Estimate | None:
    if math.isnan(value):
        return None
    if not np.isfinite(resampled).all():
        return Estimate(float(value), None, None)
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))


def wider(first: Estimate | None, second: Estimate | None) -> Estimate | None:
    """One value with the interval that covers both of its intervals."""
    if first is None or second is None:
        return None
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return Estimate(first.value, None, None)
    return Estimate(first.value, min(first.low, second.low), max(first.high, second.high))


def least_squares_slopes(bootstrap: ClusterBootstrap, x: Floats, *targets: Floats) -> list[Estimate | None]:
    """Slope of each y [N] of `targets` on x [N]: cov(x, y) / var(x); None where x is constant."""
    if np.ptp(x) == 0:
        return [None] * len(targets)
    x = x - x.mean()  # sums of squares of numbers far from zero would lose the digits that count
    centred = [y - y.mean() for y in targets]
    columns = np.stack([np.ones_like(x), x, x * x, *centred, *(x * y for y in centred)], axis=1)

    def slopes(sums: Floats) -> Floats:
        count, sum_x, sum_xx = sums[..., :1], sums[..., 1:2], sums[..., 2:3]
        sum_y, sum_xy = np.split(sums[..., 3:], 2, axis=-1)
        return (sum_xy - sum_x * sum_y / count) / (sum_xx - sum_x**2 / count)

    return bootstrap.of_sums(columns, slopes)


def ratios(bootstrap: ClusterBootstrap, numerators: Floats, denominators: Floats) -> list[Estimate | None]:
    """Sum of each column of `numerators` [N, M] over that of `denominators` [N, M]; None where that is 0."""
    count = numerators.shape[1]
    return bootstrap.of_sums(
        np.concatenate([numerators, denominators], axis=1),
        lambda sums: np.where(sums[..., count:] == 0, np.nan, sums[..., :count] / sums[..., count:]),
    )


class Ranks:
    """The relative mid-ranks F = P(X' < x) + P(X' = x) / 2 of a variable's values [N]; their mean is one half."""

    def __init__(self, values: Floats) -> None:
        distinct, self._inverse = np.unique(values, return_inverse=True)
        self._num_distinct = len(distinct)
        self.relative = self._below(np.full(len(values), 1 / len(values)))

    def _below(self, weights: Floats) -> Floats:
        """[N] the summed weights of the tokens with a smaller value, those with the same value by half."""
        of_values = sums_by_group(self._inverse, weights, self._num_distinct)
        return (np.cumsum(of_values) - of_values / 2)[self._inverse]

    def above(self, weights: Floats) -> Floats:
        """[N] the summed weights of the tokens with a larger value, those with the same value by half."""
        return weights.sum() - self._below(weights)


def rank_correlation(bootstrap: ClusterBootstrap, x: Ranks, y: Ranks) -> Estimate | None:
    """Spearman's rank correlation, cov(F, G) / sqrt(var(F) var(G)) of the relative ranks; None for a constant variable.

    To draw a token is to move the ranks of those above it too. E[F G] of a resample is therefore taken to first order
    in the weights: each token counts with F G of its own and what it adds to the ranks of all others, which makes it a
    mean over tokens, whose resamples cost nothing.
    """
    products = [_rank_product(*pair) for pair in ((x, y), (x, x), (y, y))]
    columns = np.stack([np.ones_like(x.relative), *products], axis=1)

    def correlation(sums: Floats) -> Floats:
        covariance, variance_x, variance_y = np.moveaxis(sums[..., 1:] / sums[..., :1] - 0.25, -1, 0)
        return (covariance / np.sqrt(variance_x * variance_y))[..., None]

    if np.ptp(x.relative) == 0 or np.ptp(y.relative) == 0:
        return None
    return bootstrap.of_sums(columns, correlation)[0]


def _rank_product(x: Ranks, y: Ranks) -> Floats:
    """[N] what each token adds to E[F G]; the mean is E[F G] itself."""
    f, g = x.relative, y.relative
    return f * g + (x.above(g) + y.above(f)) / len(f) - 2 * (f @ g) / len(f)


def logistic_slope(bootstrap: ClusterBootstrap, x: Floats, successes: Floats, trials: int) -> Estimate | None:
    """Slope b of the logistic regression log(p / (1 - p)) = a + b x, by maximum likelihood.

    A resample's optimum is one step of Newton's method away from that of the whole text.

    Args:
        bootstrap: over the N tokens.
        x: [N] the regressor.
        successes: [N] how many of the `trials` of each token succeeded.
        trials: the same for every token.

    Returns:
        None where x is constant, or where x tells successes and failures apart without a mistake, so that the
        likelihood has no maximum.
    """
    scale = float(x.std())
    if np.ptp(x) == 0 or not _overlap(x, successes, trials):
        return None
    x = (x - x.mean()) / scale
    parameters = _fit_logistic(x, successes, trials)

    def slope(sums: Floats) -> Floats:
        return (parameters[1] + _newton_step(sums)[..., 1:]) / scale

    return bootstrap.of_sums(_newton_columns(x, successes, trials, parameters), slope)[0]


def _overlap(x: Floats, successes: Floats, trials: int) -> bool:
    """Whether some x lies between the extremes of both outcomes, which is when the likelihood has a maximum."""
    of_successes, of_failures = x[successes > 0], x[successes < trials]
    if not len(of_successes) or not len(of_failures):
        return False
    return bool(of_successes.min() < of_failures.max() and of_failures.min() < of_successes.max())


def _fit_logistic(x: Floats, successes: Floats, trials: int) -> Floats:
    """Intercept and slope by Newton's method with halved steps, from those of a coin."""
    parameters = np.zeros(2)
    likelihood = _log_likelihood(x, successes, trials, parameters)
    for _ in range(NEWTON_STEPS):
        step = _newton_step(_newton_columns(x, successes, trials, parameters).sum(0))
        while np.abs(step).max() > NEWTON_PRECISION:
            stepped = _log_likelihood(x, successes, trials, parameters + step)
            if stepped >= likelihood:
                break
            step = step / 2
        else:
            break
        parameters, likelihood = parameters + step, stepped
    return parameters


def _log_likelihood(x: Floats, successes: Floats, trials: int, parameters: Floats) -> float:
    logits = parameters[0] + parameters[1] * x
    return float((successes * logits - trials * np.logaddexp(0, logits)).sum())


def _newton_columns(x: Floats, successes: Floats, trials: int, parameters: Floats) -> Floats:
    """[N, 5] what each token adds to the gradient (2) and to the curvature (3) of the log-likelihood."""
    p = np.exp(-np.logaddexp(0, -(parameters[0] + parameters[1] * x)))
    residual, curvature = successes - trials * p, trials * p * (1 - p)
    return np.stack([residual, residual * x, curvature, curvature * x, curvature * x * x], axis=1)


def _newton_step(sums: Floats) -> Floats:
    """[..., 2] the inverse of the curvature times the gradient, from sums [..., 5]."""
    gradient_a, gradient_b, aa, ab, bb = np.moveaxis(sums, -1, 0)
    return (
        np.stack([bb * gradient_a - ab * gradient_b, aa * gradient_b - ab * gradient_a], axis=-1)
        / (aa * bb - ab * ab)[..., None]
    )


def omega_squared(values: Floats, groups: Ints) -> float | None:
    """Share of the variance of `values` [N] that the `groups` [N] explain, corrected for how many groups there are.

    omega^2 = (SS_between - (J - 1) MS_within) / (SS_total + MS_within) over J groups: 0 in expectation where the groups
    mean nothing, where the plain SS_between / SS_total is (J - 1) / (N - 1). It can come out a little below 0.

    Returns:
        None where no group has two tokens, or the values are constant.
    """
    _, inverse = np.unique(groups, return_inverse=True)
    num_groups = int(inverse.max()) + 1
    centred = values - values.mean()
    sizes = np.bincount(inverse)
    total = float(centred @ centred)
    between = float((sums_by_group(inverse, centred, num_groups) ** 2 / sizes).sum())
    if num_groups == len(values) or np.ptp(values) == 0:
        return None
    mean_within = (total - between) / (len(values) - num_groups)
    return (between - (num_groups - 1) * mean_within) / (total + mean_within)
