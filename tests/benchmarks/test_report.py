"""Reports keep every sample on their way from process to process."""

from __future__ import annotations

import json

import pytest

from moxe.benchmarks.report import Figure, Report, merged, milliseconds, number, spread
from moxe.benchmarks.timing import Samples


def report(setting: str) -> Report:
    made = Report("training", "Training step", ["setting", "ms"], check="correct", notes=["one size"])
    made.add_row(setting, "1")
    made.add_timing("MoxE", Samples((0.001, 0.003, 0.002)), setting=setting, rows=8)
    return made


def test_a_report_survives_its_json():
    made = report("plain")
    assert Report.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_a_figure_is_kept_with_its_samples_median_and_range():
    kept = report("plain").figures[0].to_dict()
    assert kept["samples"] == pytest.approx([1, 3, 2])
    assert (kept["median"], kept["lowest"], kept["highest"]) == pytest.approx((2, 1, 3))
    assert (kept["side"], kept["quantity"], kept["setting"], kept["rows"]) == ("MoxE", "milliseconds", "plain", 8)


def test_parts_of_one_answer_are_put_together_without_saying_things_twice():
    whole = merged([report("plain"), report("best")])
    assert whole.rows == [["plain", "1"], ["best", "1"]]
    assert [figure.about["setting"] for figure in whole.figures] == ["plain", "best"]
    assert whole.notes == ["one size"]
    assert whole.check == "correct"
    assert whole.failed is None


def test_what_failed_in_one_part_is_said_beside_the_other():
    whole = merged([Report("training", "Training step", failed="wrong gradient"), report("best")])
    assert whole.failed == "wrong gradient"
    assert whole.columns == ["setting", "ms"]
    assert whole.rows == [["best", "1"]]


def test_numbers_have_three_digits_that_count():
    assert [number(x) for x in (0.1234, 1.234, 12.34, 123.4, 12345.6)] == ["0.12", "1.23", "12.3", "123", "12,346"]
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00-3.00)"
    assert milliseconds(Samples((0.5, 0.1))) == "300 (100-500)"
    assert Figure("a", "ms", (1.0, 2.0)).median == 1.5
