"""Every estimate against a plain computation or scipy's, and its interval against resamples worked out whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from moxe.observability.estimates import (
    ClusterBootstrap,
    Estimate,
    Ranks,
    least_squares_slopes,
    logistic_slope,
    omega_squared,
    rank_correlation,
    ratios,
    wider,
)

CLUSTERS, LENGTH = 60, 12


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.fixture
def bootstrap() -> ClusterBootstrap:
    return ClusterBootstrap(np.repeat(np.arange(CLUSTERS), LENGTH), seed=0)


def resampled(bootstrap: ClusterBootstrap, *columns: np.ndarray) -> list[list[np.ndarray]]:
    """The columns of the tokens of each resample, with repetitions."""
    drawn = [
        np.repeat(np.arange(len(bootstrap.clusters)), row[bootstrap.clusters].astype(int)) for row in bootstrap.counts
    ]
    return [[column[tokens] for column in columns] for tokens in drawn]


def interval(values: list[float]) -> list[float]:
    return np.quantile(values, [0.025, 0.975]).tolist()


def test_a_slope_and_its_interval_are_those_of_every_resample_worked_out(random, bootstrap):
    x = random.normal(size=CLUSTERS * LENGTH) + 100
    y = 3 * x + np.repeat(random.normal(size=CLUSTERS), LENGTH) + random.normal(size=len(x))
    slope, negative = least_squares_slopes(bootstrap, x, y, -y)
    assert slope is not None
    assert negative is not None
    assert slope.value == pytest.approx(stats.linregress(x, y).slope, rel=1e-10)
    assert negative.value == pytest.approx(-slope.value, rel=1e-12)
    worked_out = [stats.linregress(*columns).slope for columns in resampled(bootstrap, x, y)]
    assert [slope.low, slope.high] == pytest.approx(interval(worked_out), rel=1e-10)


def test_the_interval_of_a_slope_covers_it_nineteen_times_in_twenty_although_tokens_depend_on_their_neighbours(random):
    covered, of_single_tokens = 0, 0
    clusters = np.repeat(np.arange(CLUSTERS), LENGTH)
    for _ in range(60):
        x = np.repeat(random.normal(size=CLUSTERS), LENGTH) + 0.3 * random.normal(size=len(clusters))
        y = 2 * x + np.repeat(random.normal(size=CLUSTERS), LENGTH) + 0.3 * random.normal(size=len(clusters))
        for drawn in (clusters, np.arange(len(clusters))):
            (slope,) = least_squares_slopes(ClusterBootstrap(drawn, seed=0), x, y)
            assert slope is not None
            if drawn is clusters:
                covered += slope.covers(2)
            else:
                of_single_tokens += slope.covers(2)
    assert 53 <= covered <= 59
    assert of_single_tokens < 40  # what comes of taking the tokens as independent


def test_a_rank_correlation_is_spearmans_also_with_ties(random, bootstrap):
    x = random.integers(0, 30, CLUSTERS * LENGTH).astype(float)
    y = np.round(x / 10 + random.normal(size=len(x)), 1)
    estimate = rank_correlation(bootstrap, Ranks(x), Ranks(y))
    assert estimate is not None
    assert estimate.value == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-10)


def test_the_interval_of_a_rank_correlation_is_that_of_resamples_ranked_anew(random, bootstrap):
    x = np.repeat(random.normal(size=CLUSTERS), LENGTH) + random.normal(size=CLUSTERS * LENGTH)
    y = np.exp(x + random.normal(size=len(x)))
    estimate = rank_correlation(bootstrap, Ranks(x), Ranks(y))
    worked_out = interval([stats.spearmanr(*columns).statistic for columns in resampled(bootstrap, x, y)])
    assert estimate is not None
    width = worked_out[1] - worked_out[0]
    assert 0.05 < width < 0.5
    assert [estimate.low, estimate.high] == pytest.approx(worked_out, abs=0.1 * width)


@pytest.mark.parametrize("slope", [0.0, 2.5, -40.0])
def test_a_logistic_slope_is_the_likeliest_and_its_interval_that_of_resamples_fitted_anew(random, bootstrap, slope):
    x = 0.1 * random.normal(size=CLUSTERS * LENGTH) + 0.5
    y = random.binomial(2, 1 / (1 + np.exp(-slope * (x - 0.5))), len(x)).astype(float)

    def fitted(x: np.ndarray, y: np.ndarray) -> float:
        def loss(parameters: np.ndarray) -> float:
            logits = parameters[0] + parameters[1] * (x - 0.5)
            return float((2 * np.logaddexp(0, logits) - y * logits).sum())

        return optimize.minimize(loss, [0.0, slope], method="BFGS").x[1]

    estimate = logistic_slope(bootstrap, x, y, 2)
    assert estimate is not None
    assert estimate.value == pytest.approx(fitted(x, y), abs=1e-3)
    worked_out = interval([fitted(*columns) for columns in resampled(bootstrap, x, y)[:200]])
    width = worked_out[1] - worked_out[0]
    assert [estimate.low, estimate.high] == pytest.approx(worked_out, abs=0.2 * width)


def test_outcomes_that_the_regressor_tells_apart_have_no_logistic_slope(bootstrap):
    x = np.linspace(0, 1, CLUSTERS * LENGTH)
    assert logistic_slope(bootstrap, x, (x > 0.5).astype(float), 1) is None
    assert logistic_slope(bootstrap, x, np.zeros_like(x), 1) is None


def test_outcomes_that_overlap_in_two_tokens_have_a_steep_slope(bootstrap):
    x = np.linspace(0, 1, CLUSTERS * LENGTH)
    y = (x > 0.5).astype(float)
    y[[359, 360]] = y[[360, 359]]
    estimate = logistic_slope(bootstrap, x, y, 1)
    assert estimate is not None
    assert 100 < estimate.value < math.inf


def test_what_a_constant_does_not_have_is_none(bootstrap):
    constant, other = np.full(CLUSTERS * LENGTH, 0.1), np.arange(CLUSTERS * LENGTH) % 7 / 7
    assert least_squares_slopes(bootstrap, constant, other) == [None]
    assert rank_correlation(bootstrap, Ranks(constant), Ranks(other)) is None
    assert logistic_slope(bootstrap, constant, (other > 0.5).astype(float), 1) is None
    assert omega_squared(constant, np.arange(len(constant)) % 3) is None


def test_a_ratio_without_denominator_is_none_and_one_that_a_resample_lacks_has_no_interval(bootstrap):
    first = (bootstrap.clusters == 0).astype(float)  # one resample in three does not draw it
    zero, ones = np.zeros_like(first), np.ones_like(first)
    none, open_ended, exact = ratios(bootstrap, np.stack([ones, first, 2 * ones], 1), np.stack([zero, first, ones], 1))
    assert none is None
    assert open_ended == Estimate(1.0, None, None)
    assert exact == Estimate(2.0, 2.0, 2.0)
    assert not open_ended.is_above_zero
    assert not open_ended.covers(1.0)


def test_the_wider_interval_covers_both():
    assert wider(Estimate(1, 0, 2), Estimate(1, 0.5, 3)) == Estimate(1, 0, 3)
    assert wider(Estimate(1, 0, 2), Estimate(1, None, None)) == Estimate(1, None, None)
    assert wider(Estimate(1, 0, 2), None) is None


def test_omega_squared_does_not_mistake_many_groups_for_an_explanation(random):
    values, groups = random.normal(size=2000), random.integers(0, 700, 2000)
    estimates, plain = [], []
    for _ in range(20):
        random.shuffle(values)
        means = {group: values[groups == group].mean() for group in set(groups.tolist())}
        plain.append(np.var([means[group] for group in groups.tolist()]) / values.var())
        share = omega_squared(values, groups)
        assert share is not None
        estimates.append(share)
    assert np.mean(plain) > 0.3
    assert abs(np.mean(estimates)) < 0.02


def test_omega_squared_finds_the_share_that_was_planted(random):
    groups = random.integers(0, 300, 5000)
    values = 3 * random.normal(size=300)[groups] + random.normal(size=5000)
    assert omega_squared(values, groups) == pytest.approx(0.9, abs=0.02)
    assert omega_squared(random.normal(size=300)[groups], groups) == pytest.approx(1)
    assert omega_squared(values, np.arange(5000)) is None
