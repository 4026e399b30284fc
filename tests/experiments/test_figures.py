"""Every figure is drawn from the numbers, says them, and is told from its neighbours; what cannot be drawn says why."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread
from scipy import stats

from moxe.experiments.figures import Drawing, Undrawn, draw_figures
from moxe.experiments.measures import Margins
from moxe.experiments.statistics import add_statistics
from tests.experiments.synthetic import make_results, row_named

NAMES = ["fig3a", "fig3b", "fig3c", "fig3d", "fig4", "fig8", "forest", "pareto", "gamma", "theory"]


def drawn(results: dict[str, Any]) -> tuple[dict[str, Drawing], dict[str, Undrawn]]:
    add_statistics(results, Margins())
    drawings, undrawn = draw_figures(results)
    return {drawing.name: drawing for drawing in drawings}, {figure.name: figure for figure in undrawn}


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, Any], dict[str, Drawing]]:
    results = make_results()
    drawings, undrawn = drawn(results)
    assert not undrawn
    return results, drawings


def test_a_whole_grid_gives_every_figure_as_a_picture(whole: tuple[dict[str, Any], dict[str, Drawing]]):
    _, drawings = whole
    assert list(drawings) == NAMES
    for drawing in drawings.values():
        pixels = imread(io.BytesIO(drawing.png))
        assert min(pixels.shape[:2]) > 200
        assert pixels[..., :3].std() > 0.02
        assert drawing.alt
        assert re.search(r"\d", drawing.caption)
        assert ElementTree.fromstring(drawing.svg).tag.endswith("svg")


def test_text_and_axes_follow_the_page_into_the_dark(whole: tuple[dict[str, Any], dict[str, Drawing]]):
    for drawing in whole[1].values():
        assert "currentColor" in drawing.svg
        assert "prefers-color-scheme:dark" in drawing.svg
        assert drawing.svg.count("#1a1a1b") == 1  # in the rule for a light page alone
        assert "#ffffff" not in drawing.svg or drawing.name == "fig8"  # the white between its bands


def test_curves_are_told_apart_without_colours(whole: tuple[dict[str, Any], dict[str, Drawing]]):
    """Four models, four line styles: one has no dashes, the others three patterns."""
    patterns = set(re.findall(r"stroke-dasharray: ([\d., ]+)", whole[1]["fig3b"].svg))
    assert len(patterns) == 3


def test_a_model_keeps_its_colour_in_every_figure(whole: tuple[dict[str, Any], dict[str, Drawing]]):
    """Qwen is the fourth of Table 1; in the figure of the routers it is the second line, in its own colour."""
    assert "#cc79a7" in whole[1]["fig3c"].svg
    assert "#d55e00" not in whole[1]["fig3c"].svg


def test_captions_say_the_computed_numbers(whole: tuple[dict[str, Any], dict[str, Drawing]]):
    results, drawings = whole
    mean = np.mean([run["validation_loss"] for run in row_named(results, "gemma2")["runs"]])
    assert f"Gemma 2 {mean:.4g} (n 5)" in drawings["fig3b"].caption
    word = row_named(results, "moxe")["summary"]["lambada_perplexity"]
    assert f"MoxE {word['mean']:,.0f} [{word['low']:,.0f}, {word['high']:,.0f}]" in drawings["fig4"].caption
    against = row_named(results, "standard")["against_moxe"]["validation_loss"]
    interval = f"{against['mean']:+.4f} [{against['low']:+.4f}, {against['high']:+.4f}]"
    assert f"standard {interval} (worse)" in drawings["forest"].caption
    slopes = [
        run["analysis"]["layers"][0]["difficulty"]["odds_slope"]["value"] for run in row_named(results, "moxe")["runs"]
    ]
    low, high = stats.t.interval(0.95, 4, np.mean(slopes), stats.sem(slopes))
    assert f"layer 0 {np.mean(slopes):.4g} [{low:.4g}, {high:.4g}]" in drawings["theory"].caption
    shift = row_named(results, "gamma-2")["against_moxe"]["validation_loss"]["mean"]
    assert f"gamma 2: {shift:+.4f}" in drawings["gamma"].caption
    assert "MoxE, gamma 0.7: +0.0000" in drawings["gamma"].caption


def without_lambada(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        for run in row["runs"]:
            run["lambada_perplexity"] = None


def without_load(results: dict[str, Any]) -> None:
    for run in row_named(results, "no-group-loss")["runs"]:
        del run["curves"]["load"]


def without_analysis(results: dict[str, Any]) -> None:
    for run in row_named(results, "moxe")["runs"]:
        run["analysis"] = None


def without_table_2(results: dict[str, Any]) -> None:
    results["rows"] = [row for row in results["rows"] if row["section"] != "table2"]


def without_routers(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        for run in row["runs"]:
            run["curves"]["training"].pop("z_loss", None)


@pytest.mark.parametrize(
    ("take", "name", "why"),
    [
        (without_lambada, "fig4", "LAMBADA"),
        (without_load, "fig8", "with and without the group loss"),
        (without_analysis, "theory", "no run of MoxE was analysed"),
        (without_table_2, "forest", "no row of Table 2"),
        (without_routers, "fig3c", "curve of its router z-loss"),
    ],
)
def test_a_figure_without_its_data_is_left_out_and_says_so(take: Callable[[dict[str, Any]], None], name: str, why: str):
    results = make_results(seeds=1)
    take(results)
    drawings, undrawn = drawn(results)
    assert name not in drawings
    assert why in undrawn[name].why
    assert drawings.keys() | undrawn.keys() == set(NAMES)


def test_points_that_are_not_finite_are_not_drawn():
    results = make_results(seeds=2)
    curve = row_named(results, "moxe")["runs"][0]["curves"]["training"]
    curve["lm_loss"][2], curve["z_loss"] = math.nan, [math.inf] * len(curve["tokens"])
    drawings, _ = drawn(results)
    assert "(n 2)" in drawings["fig3a"].caption
    assert "MoxE 2 (n 1)" in drawings["fig3c"].caption
    assert "nan" not in drawings["fig3a"].caption
