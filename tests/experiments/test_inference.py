"""The intervals cover, the tests are the textbook's, and what is said to be detectable is detected."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from moxe.experiments.inference import detectable_difference, estimate, holm, paired_test


def test_the_interval_covers_the_mean_95_times_of_100():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (2000, 4))
    estimates = [estimate(draw) for draw in draws]
    covered = np.mean([one.low <= 3.0 <= one.high for one in estimates if one.low is not None and one.high is not None])
    assert len(estimates) == 2000
    assert abs(covered - 0.95) < 0.015  # three standard errors of 2000 draws


def test_the_interval_is_the_textbooks():
    """1, 2, 3: the mean is 2, the sd is 1, and t at 97.5% with 2 degrees of freedom is 4.302653."""
    found = estimate([1.0, 2.0, 3.0])
    assert (found.n, found.mean, found.sd) == (3, 2.0, 1.0)
    assert (found.low, found.high) == pytest.approx(
        (2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-6
    )


def test_one_value_has_no_interval_and_equal_values_have_one_of_no_width():
    alone = estimate([1.5])
    assert (alone.mean, alone.low, alone.high, alone.sd) == (1.5, None, None, None)
    equal = estimate([0.1 + 0.2, 0.3, 0.3])
    assert (equal.sd, equal.low) == (0.0, equal.mean)


def test_p_values_are_those_of_scipys_tests():
    ours, theirs, margin = [4.1, 4.3, 4.05, 4.4], [4.0, 4.22, 4.01, 4.25], 0.2
    tested = paired_test(ours, theirs, margin)
    differences = np.subtract(ours, theirs)
    below = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    above = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    assert tested.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, rel=1e-10)
    assert tested.equivalence_p == pytest.approx(max(below, above), rel=1e-10)
    mirrored = paired_test(theirs, ours, margin)
    assert (mirrored.p, mirrored.equivalence_p) == pytest.approx((tested.p, tested.equivalence_p), rel=1e-10)


def test_holm_is_as_computed_by_hand():
    """Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, then 0.04 x 1 is raised to the 0.06 before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_a_detectable_difference_is_found_80_times_of_100(n: int):
    sd = 0.3
    true = detectable_difference(n, sd)
    draws = np.random.default_rng(n).normal(true, sd, (20_000, n))
    found = stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05
    assert abs(found.mean() - 0.8) < 0.01


@pytest.mark.parametrize(
    ("ours", "theirs"), [([4.1], [4.0]), ([4.1, 4.2, 4.3], [4.0, 4.1, 4.2]), ([4.0, 5.0], [4.0, 5.0])]
)
def test_what_does_not_vary_is_not_tested_and_says_why(ours: list[float], theirs: list[float]):
    tested = paired_test(ours, theirs, 0.02)
    assert tested.why_untested
    assert (tested.p, tested.equivalence_p, tested.detectable) == (None, None, None)
    assert tested.estimate.mean == pytest.approx(ours[0] - theirs[0])
