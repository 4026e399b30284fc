"""What is written is read back, and what cannot be read is said in one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moxe.errors import UserError
from moxe.experiments.results_file import read_results, write_results


def test_numbers_that_json_does_not_have_survive(tmp_path: Path):
    results = {
        "format": 1,
        "rows": [{"a/b": [1.5, math.inf, [-math.inf]], "count": np.int64(3), "loss": np.float64("nan")}],
        "array": np.array([0.5, 2.0]),
    }
    write_results(results, tmp_path / "results.json")
    raw = json.loads((tmp_path / "results.json").read_text())
    assert raw["rows"][0]["loss"] is None
    assert {"path": ["rows", 0, "loss"], "value": "nan"} in raw["not_finite"]
    read = read_results(tmp_path / "results.json")
    assert read["rows"][0]["a/b"] == [1.5, math.inf, [-math.inf]]
    assert math.isnan(read["rows"][0]["loss"])
    assert (read["rows"][0]["count"], read["array"]) == (3, [0.5, 2.0])
    assert "not_finite" not in read


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "cannot be read"), ("{", "is no JSON"), ("[]", "no results of format 1"), ('{"format": 2}', "of format 1")],
)
def test_what_is_no_results_file_is_refused(content: str | None, sentence: str, tmp_path: Path):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_results(path)
