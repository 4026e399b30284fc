"""What is drawn of several runs is what their metrics.jsonl hold: lines, bands, panels, legend."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from moxe.errors import UserError
from moxe.observability import comparison
from moxe.observability.comparison import curve, draw_comparison
from tests.observability.runs import read_lines, write_lines, write_run

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures of the last comparison, which are not written."""
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(comparison, "save_all", lambda drawn, *_: figures.update(drawn) or [])
    return figures


def panel(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title() == title)


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def points(axes: Axes, line: int) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in axes.lines[line].get_xydata()]  # type: ignore[union-attr]


def edges(axes: Axes, band: int) -> dict[float, tuple[float, float]]:
    """By step the lower and the upper edge of a band."""
    (path,) = axes.collections[band].get_paths()
    heights: dict[float, set[float]] = {}
    for x, y in np.asarray(path.vertices):
        heights.setdefault(float(x), set()).add(float(y))
    return {x: (min(of_x), max(of_x)) for x, of_x in heights.items()}


def test_the_line_of_one_run_is_its_numbers(tmp_path: Path, drawn: dict[str, Figure]):
    paths = [write_run(tmp_path / name, 5, shift=shift) for name, shift in (("a", 0.0), ("b", 0.2))]
    draw_comparison({"a": [paths[0]], "b": [paths[1]]}, tmp_path / "plots")
    for place, path in enumerate(paths):
        training, validation = read_lines(path, "layers"), read_lines(path, "validation_loss")
        for title, key in (("Cross-entropy (nats a token)", "lm_loss"), ("Group loss", "group_loss")):
            axes = panel(drawn["losses"], title)
            assert points(axes, 2 * place) == [(line["step"], line[key]) for line in training]
            assert points(axes, 2 * place + 1) == [(line["step"], line[f"validation_{key}"]) for line in validation]
            assert not axes.collections
        (axes,) = drawn["speed"].axes
        assert points(axes, place) == [(line["step"], line["tokens_per_second"]) for line in training]
        axes = panel(drawn["routing"], "Layer 1: difficulty, mean")
        assert points(axes, place) == [(line["step"], line["layers"][1]["difficulty_mean"]) for line in training]
    assert all(figure.get_suptitle() == "" for figure in drawn.values())
    assert legend(drawn["losses"]) == ["a", "b", "training", "validation"]
    assert legend(drawn["speed"]) == ["a", "b"]


def test_seeds_are_one_line_their_mean_in_a_band_from_least_to_greatest(tmp_path: Path, drawn: dict[str, Figure]):
    paths = [write_run(tmp_path / str(seed), 6, shift=shift) for seed, shift in enumerate((0.3, 0.0, 0.1))]
    draw_comparison({"full": paths}, tmp_path / "plots")
    columns = np.array([[line["z_loss"] for line in read_lines(path, "layers")] for path in paths])
    axes = panel(drawn["losses"], "Router z-loss")
    np.testing.assert_array_equal([y for _, y in points(axes, 0)], columns.mean(axis=0))
    expected = dict(enumerate(zip(columns.min(axis=0), columns.max(axis=0), strict=True), start=1))
    assert edges(axes, 0) == expected
    assert expected[1] == (1.0, 1.3)
    for figure in drawn.values():
        assert figure.get_suptitle() == (
            "Line: mean over the runs of a setting. Band: from the least to the greatest of them."
        )
        assert legend(figure)[0] == "full (3 runs)"


def test_seeds_are_drawn_where_all_of_them_have_a_line(tmp_path: Path, drawn: dict[str, Figure]):
    paths = [
        write_run(tmp_path / "a", 12),
        write_run(tmp_path / "b", 3, every=2),
        write_run(tmp_path / "c", 3, every=3),
    ]
    draw_comparison({"two": paths[:2], "other": [paths[2]]}, tmp_path / "plots")
    (axes,) = drawn["speed"].axes
    assert [x for x, _ in points(axes, 0)] == [2, 4, 6]
    assert [x for x, _ in points(axes, 1)] == [3, 6, 9]


def test_how_far_a_setting_is_drawn_is_said_where_its_runs_do_not_end_together(
    tmp_path: Path, drawn: dict[str, Figure]
):
    ends = {"a": 4, "b": 2, "c": 4, "d": 2}
    a, b, c, d = (write_run(tmp_path / name, lines, every=50) for name, lines in ends.items())
    said: list[str] = []
    draw_comparison({"full": [a, b], "same": [c]}, tmp_path / "plots", say=said.append)
    assert said == [f"full: drawn to step 100, where {b} ends; its longest run goes to step 200"]
    (axes,) = drawn["speed"].axes
    assert points(axes, 0)[-1][0] == 100

    said.clear()
    draw_comparison({"same": [a, c], "three": [b, c, d]}, tmp_path / "plots", say=said.append)
    assert said == [f"three: drawn to step 100, where {b}, {d} end; its longest run goes to step 200"]

    said.clear()
    other = write_run(tmp_path / "e", 3, every=30)
    draw_comparison({"mixed": [write_run(tmp_path / "f", 4, every=20), other]}, tmp_path / "plots", say=said.append)
    assert said == [
        "mixed: drawn to step 60, the last that all of its runs have a line for; its longest run goes to step 90"
    ]


def test_a_number_that_is_not_finite_is_a_gap(tmp_path: Path, drawn: dict[str, Figure]):
    paths = [write_run(tmp_path / "a", 4), write_run(tmp_path / "b", 4, shift=0.5)]
    records = read_lines(paths[0])
    records[2]["lm_loss"], records[4]["lm_loss"] = math.nan, math.inf
    write_lines(paths[0], records)
    draw_comparison({"full": paths}, tmp_path / "plots")
    heights = [y for _, y in points(panel(drawn["losses"], "Cross-entropy (nats a token)"), 0)]
    assert np.isnan(heights).tolist() == [False, True, True, False]


def test_the_unevenness_of_the_load_is_that_of_the_lines(tmp_path: Path, drawn: dict[str, Figure]):
    """A spread of shares p over E experts that add up to 1: sqrt(E * sum(p ** 2) - 1)."""
    even, uneven = write_run(tmp_path / "a", 3, experts=8), write_run(tmp_path / "b", 3, experts=4, shift=0.5)
    draw_comparison({"even": [even], "uneven": [uneven]}, tmp_path / "plots")
    spread = panel(drawn["utilisation"], "Layer 0: spread of the load (sd / mean)")
    busiest = panel(drawn["utilisation"], "Layer 0: busiest expert (1 = fair share)")
    least = panel(drawn["utilisation"], "Layer 0: least loaded expert (1 = fair share)")
    assert points(spread, 0) == [(1, 0), (2, 0), (3, 0)]
    assert points(busiest, 0) == points(least, 0) == [(1, 1), (2, 1), (3, 1)]
    loads = np.array([line["layers"][0]["load"] for line in read_lines(uneven, "layers")])
    assert loads[-1].max() > 2 * loads[-1].min()
    for axes, expected in (
        (spread, np.sqrt(4 * (loads**2).sum(axis=1) - 1)),
        (busiest, 4 * loads.max(axis=1)),
        (least, 4 * loads.min(axis=1)),
    ):
        assert [y for _, y in points(axes, 1)] == pytest.approx(expected, rel=1e-12)


def test_a_setting_is_drawn_where_it_has_the_layer_and_the_quantity(tmp_path: Path, drawn: dict[str, Figure]):
    settings = {
        "deep": [write_run(tmp_path / "deep", 3, layers=3)],
        "dense": [write_run(tmp_path / "dense", 3, layers=0)],
        "plain router": [write_run(tmp_path / "plain", 3, layers=1, difficulty=False)],
    }
    draw_comparison(settings, tmp_path / "plots")
    routing = drawn["routing"]
    lines = {title: len(panel(routing, title).lines) for title in titles(routing)}
    assert len(lines) == 3 * 4
    assert [lines[f"Layer {layer}: difficulty, mean"] for layer in range(3)] == [1, 1, 1]
    assert [lines[f"Layer {layer}: router entropy (1 = uniform)"] for layer in range(3)] == [2, 1, 1]
    assert legend(routing) == legend(drawn["utilisation"]) == ["deep", "plain router"]
    assert legend(drawn["speed"]) == ["deep", "dense", "plain router"]
    of_panels = {title: len(panel(drawn["losses"], title).lines) for title in titles(drawn["losses"])}
    assert of_panels["Cross-entropy (nats a token)"] == 2 * 3
    assert of_panels["Difficulty loss"] == 2 * 1
    assert of_panels["Gradient norm before clipping"] == 3


def test_a_setting_keeps_its_colour_in_every_picture(tmp_path: Path, drawn: dict[str, Figure]):
    dense, routed = write_run(tmp_path / "dense", 3, layers=0), write_run(tmp_path / "routed", 3)
    draw_comparison({"dense": [dense], "routed": [routed]}, tmp_path / "plots")
    (of_routing,) = panel(drawn["routing"], "Layer 0: difficulty, variance").lines
    of_speed = drawn["speed"].axes[0].lines[1]
    assert of_routing.get_color() == of_speed.get_color() != drawn["speed"].axes[0].lines[0].get_color()
    assert of_routing.get_marker() == of_speed.get_marker()


def test_twenty_settings_are_told_apart(tmp_path: Path, drawn: dict[str, Figure]):
    path = write_run(tmp_path, 3)
    draw_comparison({str(place): [path] for place in range(20)}, tmp_path / "plots")
    styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in drawn["speed"].axes[0].lines}
    assert len(styles) == 20
    assert len(legend(drawn["speed"])) == 20


def test_models_without_routers_give_losses_and_speed_alone(tmp_path: Path):
    path = write_run(tmp_path, 3, layers=0)
    files = draw_comparison({"a": [path], "b": [path]}, tmp_path / "plots", formats=["png"])
    assert [file.name for file in files] == ["losses.png", "speed.png"]
    assert sorted(files) == sorted((tmp_path / "plots").iterdir())
    assert all(imread(file).std() > 0.01 for file in files)


def test_the_same_runs_give_the_same_svg(tmp_path: Path):
    paths = [write_run(tmp_path / str(seed), 3, layers=1, shift=seed / 10) for seed in range(3)]
    settings = {"full": paths[:2], "no group loss": paths[2:]}
    files, again = (draw_comparison(settings, tmp_path / folder, ["svg"]) for folder in ("plots", "again"))
    assert [file.name for file in files] == ["losses.svg", "speed.svg", "routing.svg", "utilisation.svg"]
    for picture, other in zip(files, again, strict=True):
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")
        assert picture.read_bytes() == other.read_bytes(), picture.name


@pytest.mark.parametrize(
    ("label", "written"),
    [
        ("$x$\\_{", "$x$\\_{"),
        ("_hidden", "_hidden"),
        ("été γ", "été γ"),
        ("日\n\udcff", "\\u65e5\\n\\udcff"),
        ("a" * 99 + "b" * 99, "a" * 24 + " … " + "b" * 24),
    ],
)
def test_any_label_can_be_written(label: str, written: str, tmp_path: Path, drawn: dict[str, Figure]):
    draw_comparison({label: [write_run(tmp_path, 3, layers=0)]}, tmp_path / "plots")
    assert legend(drawn["speed"]) == [written]
    drawn["speed"].savefig(tmp_path / "speed.svg")


def test_gradients_of_which_none_is_positive_and_finite_can_be_drawn(tmp_path: Path):
    paths = [write_run(tmp_path / name, 3, layers=0) for name in ("a", "b", "c")]
    for path, norm in zip(paths, (0.0, math.nan, math.inf), strict=True):
        write_lines(path, [{**record, "gradient_norm": norm} for record in read_lines(path)])
    assert draw_comparison({path.parent.name: [path] for path in paths}, tmp_path / "plots", formats=["png"])


def test_runs_of_a_setting_without_a_common_step_are_refused_and_nothing_is_written(tmp_path: Path):
    paths = [write_run(tmp_path / "a", 2, every=2), write_run(tmp_path / "b", 1, every=3)]
    with pytest.raises(UserError, match=r"the runs of 'full' have no step in common.*a/metrics\.jsonl, .*b/metrics"):
        draw_comparison({"full": paths}, tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_a_file_that_cannot_be_written_leaves_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(figure: Figure, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="No space left"):
        draw_comparison({"full": [write_run(tmp_path, 2)]}, tmp_path / "plots")
    assert not list((tmp_path / "plots").iterdir())


def test_a_quantity_that_one_of_the_runs_lacks_has_no_curve():
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert curve([lines, [{"step": 1}]], lambda line: line.get("loss")) is None
    of_one = curve([lines], lambda line: line.get("loss"))
    assert of_one is not None
    assert of_one.mean.tolist() == of_one.least.tolist() == of_one.greatest.tolist() == [2.0, 1.0]


def test_drawing_needs_no_torch(tmp_path: Path):
    path = write_run(tmp_path, 3, layers=1)
    code = (
        "import sys; sys.argv[0] = 'moxe'; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from moxe.observability.comparison import draw_comparison\n"
        "from moxe.observability.plots import draw_run\n"
        f"print(len(draw_run({str(path)!r}, {str(tmp_path / 'one')!r}, ['png'])))\n"
        f"print(len(draw_comparison({{'a': [{str(path)!r}]}}, {str(tmp_path / 'two')!r}, ['png'])))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("5\n4\n", "")
