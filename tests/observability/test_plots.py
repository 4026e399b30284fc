"""The pictures of a run come from metrics.jsonl alone, for every kind of run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from moxe.errors import UserError
from moxe.observability import plots
from moxe.observability.plots import draw_run
from tests.observability.runs import read_lines, write_lines, write_run

NAMES = ["losses", "utilisation", "routing", "gradients", "speed"]


@pytest.mark.parametrize(
    "run",
    [
        {"lines": 1},
        {"lines": 3, "layers": 4, "experts": 16},
        {"lines": 3, "layers": 1, "experts": 2, "difficulty": False},
    ],
)
def test_a_run_gives_five_pictures_each_as_png_and_svg(run: dict[str, Any], tmp_path: Path):
    files = draw_run(write_run(tmp_path, **run), tmp_path / "plots")
    assert [file.name for file in files] == [f"{name}.{suffix}" for name in NAMES for suffix in ("png", "svg")]
    assert sorted(files) == sorted((tmp_path / "plots").iterdir())
    for file in files:
        if file.suffix == ".svg":
            assert ElementTree.parse(file).getroot().tag.endswith("svg")
        else:
            pixels = imread(file)
            assert min(pixels.shape[:2]) > 200
            assert pixels.std() > 0.01


def test_a_model_without_routers_has_no_pictures_of_them(tmp_path: Path):
    files = draw_run(write_run(tmp_path, 3, layers=0), tmp_path / "plots", formats=["png"])
    assert [file.name for file in files] == ["losses.png", "gradients.png", "speed.png"]


def test_the_speed_drawn_is_that_of_the_lines_with_its_median(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(plots, "save_all", lambda figures, *_: drawn.update(figures) or [])
    path = write_run(tmp_path, 4)
    draw_run(path, tmp_path / "plots")
    speed, median = drawn["speed"].axes[0].lines
    lines = read_lines(path, "layers")
    assert list(speed.get_xdata()) == [line["step"] for line in lines]
    assert list(speed.get_ydata()) == [line["tokens_per_second"] for line in lines] == [1001, 1002, 1003, 1004]
    assert set(median.get_ydata()) == {1002.5}
    assert median.get_label() == "median 1,002"


def test_losses_that_are_not_finite_can_be_drawn(tmp_path: Path):
    path = write_run(tmp_path, 3)
    records = read_lines(path)
    records[2]["lm_loss"] = math.nan
    records[2]["gradient_norms"]["embedding"] = math.nan
    write_lines(path, records)
    assert len(draw_run(path, tmp_path / "plots", formats=["png"])) == 5


@pytest.mark.parametrize("norm", [0.0, math.nan, math.inf])
def test_gradients_of_which_none_is_positive_and_finite_can_be_drawn(norm: float, tmp_path: Path):
    path = write_run(tmp_path, 3)
    records = read_lines(path)
    for record in records:
        record.update({"gradient_norm": norm, "gradient_norms": {"embedding": norm, "head": norm}})
    write_lines(path, records)
    assert len(draw_run(path, tmp_path / "plots", formats=["png"])) == 5


@pytest.mark.parametrize(("lines_with_norms", "names"), [(0, [*NAMES[:3], "speed"]), (1, NAMES)])
def test_lines_without_gradient_norms_can_be_drawn(lines_with_norms: int, names: list[str], tmp_path: Path):
    path = write_run(tmp_path, 3)
    records = read_lines(path)
    for record in [record for record in records if "layers" in record][: 3 - lines_with_norms]:
        del record["gradient_norms"]
    write_lines(path, records)
    assert [file.stem for file in draw_run(path, tmp_path / "plots", formats=["png"])] == names


def test_a_missing_or_empty_metrics_file_is_refused_and_nothing_is_drawn(tmp_path: Path):
    with pytest.raises(UserError, match="no metrics file"):
        draw_run(tmp_path / "none.jsonl", tmp_path / "plots")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no training line"):
        draw_run(tmp_path / "empty.jsonl", tmp_path / "plots")
    assert not (tmp_path / "plots").exists()
