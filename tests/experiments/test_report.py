"""The report says what results.json says, asks for nothing from elsewhere, and hides no run."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from moxe.experiments.measures import Margins
from moxe.experiments.report import write_report
from moxe.experiments.results_file import read_results
from moxe.experiments.statistics import add_statistics
from tests.experiments.synthetic import GAMMA, diverge, fail, make_results, row_named

HOSTILE = "</script><img src=x onerror=alert(1)> | [a](javascript:b) $\\frac"


class Page(HTMLParser):
    """Tables of text, every tag with its attributes, and the text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._in_cell = False
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def report_of(results: dict[str, Any], folder: Path) -> tuple[dict[str, Any], str, Page]:
    """results.json as read back, the Markdown of both tables, the page."""
    add_statistics(results, Margins())
    write_report(results, folder)
    markdown = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("table?.md")))
    return read_results(folder / "results.json"), markdown, Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Page, Path]:
    results = make_results()
    fail(row_named(results, "gemma2"), 1, "out of memory")
    diverge(row_named(results, "noisy"), 2, math.nan)
    row_named(results, "xlstm")["label"] = HOSTILE
    row_named(results, "xlstm")["note"] = HOSTILE
    folder = tmp_path_factory.mktemp("report")
    return *report_of(results, folder), folder


def markdown_tables(markdown: str) -> list[list[list[str]]]:
    tables: list[list[list[str]]] = []
    inside = False
    for line in markdown.splitlines():
        if not line.startswith("|"):
            inside = False
        elif not line.startswith("|---"):
            if not inside:
                tables.append([])
            inside = True
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            tables[-1].append([cell.strip() for cell in cells])
    return tables


def numbers(cell: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(r"[-+]?\d[\d,]*(?:\.\d+)?", cell)]


def unescaped(cell: str) -> str:
    for escaped, plain in (("\\|", "|"), ("]\\(", "]("), ("\\\\", "\\"), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        cell = cell.replace(escaped, plain)
    return cell


def test_the_page_and_the_markdown_hold_the_same_tables(written: tuple[dict[str, Any], str, Page, Path]):
    _, markdown, page, _ = written
    of_markdown = [[[unescaped(cell) for cell in row] for row in table] for table in markdown_tables(markdown)]
    assert len(of_markdown) > 10
    assert page.tables == of_markdown


def test_every_number_is_the_one_in_results_json(written: tuple[dict[str, Any], str, Page, Path]):
    results, markdown, _, _ = written
    rows = {row["label"]: row for row in results["rows"]}
    checked = 0
    for head, *body in markdown_tables(markdown)[1:]:  # the first is that of the claims
        for cells in body:
            if cells[0].endswith("(no model)"):
                continue
            row = rows[unescaped(cells[0]).split(", layer")[0]]
            for column, cell, expected, unit in expectations(row, head, cells):
                assert numbers(cell) == pytest.approx(expected, abs=0.5000001 * unit), f"{row['name']}, {column}"
                checked += len(expected)
    assert checked > 300


def expectations(row: dict[str, Any], head: list[str], cells: list[str]) -> list[tuple[str, str, list[float], float]]:
    """Column, cell, the numbers that results.json gives for it, and one unit of the last digit."""
    if head[2].startswith("validation loss"):
        loss, against = row["summary"]["validation_loss"], row["against_moxe"].get("validation_loss")
        expected = [
            (2, [loss["mean"], (loss["high"] - loss["low"]) / 2], 1e-4),
            (8, mean_and_half(row, "bits_per_byte"), 1e-4),
        ]
        return named(head, cells, expected + compared(against, 3, 5, 1e-4))
    if head[2].startswith("perplexity of the last word"):
        word, token = row["summary"]["lambada_perplexity"], row["summary"]["lambada_token_perplexity"]
        paper, change = row["paper"]["lambada_perplexity"], row["paper"]["change_percent"]
        expected = [
            (1, [word["n"]], 1),
            (2, [word["mean"], word["low"], word["high"]], 0.1),
            (3, [] if paper is None else [paper], 0.01),
            (5, [] if change is None else [1 + change / 100], 0.01),
            (10, [token["mean"], token["low"], token["high"]], 0.1),
            (13, mean_and_half(row, "lambada_accuracy"), 1e-4),
        ]
        against = row["against_moxe"]
        return named(
            head,
            cells,
            expected
            + compared(against.get("lambada_perplexity"), 4, 7, 1e-3)
            + compared(against.get("lambada_token_perplexity"), 11, None, 1e-3)
            + compared(against.get("lambada_accuracy"), 14, None, 1e-4),
        )
    if head[1] == "parameters":
        paper, speed = row["paper"]["parameters"], row["summary"]["tokens_per_second"]
        peaks = [run["peak_memory_bytes"] for run in row["runs"] if run["status"] == "done"]
        expected = [
            (1, [row["parameters"]], 1),
            (2, [100.0], 0.1),  # all have as many
            (3, [] if paper is None else [paper / 1e6], 1),
            (4, [row["active_parameters"]], 1),
            (5, [row["flops_per_token"]], 1),
            (6, [row["speed"]["tokens_per_second"]] if row["speed"] else [], 1),
            (7, [1000 * row["speed"]["seconds_a_generated_token"]] if row["speed"] else [], 0.01),
            (8, [speed["mean"], speed["low"], speed["high"]], 1),
            (9, [sum(peaks) / len(peaks) / 1e6], 1),
        ]
        return named(head, cells, expected)
    if head[1] == "2 gamma":
        layer = int(cells[0].rsplit(" ", 1)[1])
        slopes = [run["analysis"]["layers"][layer]["difficulty"]["odds_slope"]["value"] for run in row["runs"]]
        low, high = stats.t.interval(0.95, len(slopes) - 1, np.mean(slopes), stats.sem(slopes))
        expected = [(1, [2 * GAMMA], 0.1), (2, [float(np.mean(slopes)), low, high], 1e-3)]
        return named(head, cells, expected)
    return []


def mean_and_half(row: dict[str, Any], key: str) -> list[float]:
    summary = row["summary"][key]
    return [summary["mean"], (summary["high"] - summary["low"]) / 2]


def compared(
    against: dict[str, Any] | None, at: int, p_at: int | None, unit: float
) -> list[tuple[int, list[float], float]]:
    if against is None:
        return [(at, [], unit)]
    found = [(at, [against["mean"], against["low"], against["high"]], unit)]
    if p_at is not None:
        found += [
            (p_at + place, [max(against[key], 1e-4)], 1e-4) for place, key in enumerate(("holm_p", "equivalence_p"))
        ]
        found.append((p_at + 2, [against["detectable"]], unit))
    return found


def named(
    head: list[str], cells: list[str], expected: list[tuple[int, list[float], float]]
) -> list[tuple[str, str, list[float], float]]:
    return [(head[place], cells[place], values, unit) for place, values, unit in expected]


def test_losses_at_equal_time_are_those_in_results_json(written: tuple[dict[str, Any], str, Page, Path]):
    results, _, page, _ = written
    (head, *body) = next(table for table in page.tables if table[0][1] == "parameters")
    rows = {row["label"]: row for row in results["rows"]}
    common = results["equal_time"]["table1"]["at"]
    assert len(common) == 2
    first = next(place for place, column in enumerate(head) if column.startswith("loss when"))
    for cells in body:
        for place, at in enumerate(common):
            found = at["losses"][rows[cells[0]]["name"]]
            assert numbers(cells[first + place]) == pytest.approx(
                [found["mean"], found["high"] - found["mean"]], abs=6e-5
            )
            assert f"({at['seconds']:,.0f} s)" in head[first + place]


def test_verdicts_claims_and_figures_of_results_json_are_on_the_page(written: tuple[dict[str, Any], str, Page, Path]):
    results, _, page, folder = written
    assert page.tables[0][1:] == [[claim["claim"], claim["verdict"], claim["because"]] for claim in results["claims"]]
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    files = sorted(path.stem for path in (folder / "figures").glob("*.svg"))
    assert files == sorted(path.stem for path in (folder / "figures").glob("*.png"))
    assert len(images) == len(files) == 10
    assert all(image["alt"] for image in images)


def test_the_page_asks_for_nothing(written: tuple[dict[str, Any], str, Page, Path]):
    _, _, page, folder = written
    fetched = [
        str(value)
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster", "background")
    ]
    assert len(fetched) > 10
    assert all(value.startswith(("data:image/svg+xml;base64,", "#")) for value in fetched)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "form", "base"}
    content = (folder / "report.html").read_text(encoding="utf-8")
    assert "url(" not in content
    assert "@import" not in content
    for drawing in re.findall(r"base64,([\w+/=]+)", content):
        svg = base64.b64decode(drawing).decode()
        assert not re.search(r"(?:href|src)=\"(?!#)", svg)
        assert not re.search(r"url\((?!#)", svg)
        assert "<script" not in svg


def test_labels_that_are_markup_are_inert(written: tuple[dict[str, Any], str, Page, Path]):
    _, markdown, page, _ = written
    assert HOSTILE in page.text
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert all(attributes["src"] != "x" for tag, attributes in page.tags if tag == "img")
    assert "<img" not in markdown
    assert "](javascript" not in markdown
    widths = {len(row) == len(table[0]) for table in markdown_tables(markdown) for row in table}
    assert widths == {True}  # the bar in the label opened no further cell


def test_failed_and_diverged_runs_are_said(written: tuple[dict[str, Any], str, Page, Path]):
    _, markdown, page, _ = written
    for text in (markdown, page.text):
        assert "Gemma 2, seed 1: failed: out of memory" in text
        assert "noisy, seed 2: diverged, its loss is nan" in text
        assert "4 of 5 (1 failed)" in text
        assert "4 of 5 (1 diverged)" in text


def test_results_json_is_the_same_every_time_and_keeps_what_is_not_finite(
    written: tuple[dict[str, Any], str, Page, Path], tmp_path: Path
):
    results, _, _, folder = written
    assert math.isnan(row_named(results, "noisy")["runs"][2]["validation_loss"])
    assert row_named(results, "noisy")["runs"][2]["lambada_perplexity"] == math.inf
    text = (folder / "results.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    write_report(results, tmp_path)
    for path in folder.rglob("*.*"):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name


def test_one_seed_is_reported_without_intervals(tmp_path: Path):
    _, markdown, page = report_of(make_results(seeds=1), tmp_path)
    for text in (markdown, page.text):
        assert "not tested: one seed has no spread to test against" in text
    loss_table = table_titled(markdown, "Validation loss")
    assert [len(numbers(cells[2])) for cells in loss_table[1:5]] == [1, 1, 1, 1]
    assert len(list((tmp_path / "figures").glob("*.png"))) == 10


def test_a_grid_that_has_hardly_begun_is_reported_and_old_figures_go(tmp_path: Path):
    results = make_results(seeds=1)
    for row in results["rows"]:
        row["runs"] = [{"seed": 0, "status": "missing", "error": None}]
        row["tuning"], row["speed"] = [], None
    results["data"]["lambada"] = None
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "fig4.png").write_bytes(b"old")
    _, markdown, page = report_of(results, tmp_path)
    assert list((tmp_path / "figures").iterdir()) == []
    assert "no run of Table 1 was measured on LAMBADA" in page.text
    assert "MoxE, seed 0: missing" in markdown
    assert "holds" not in [cells[1] for cells in page.tables[0]]


def table_titled(markdown: str, title: str) -> list[list[str]]:
    """The first table below a heading."""
    return markdown_tables(markdown.split(f"### {title}\n", 1)[1])[0]


def test_a_model_that_is_still_being_tuned_has_no_learning_rate(tmp_path: Path):
    results = make_results(seeds=1)
    row = row_named(results, "gemma2")
    row["learning_rate"], row["runs"] = None, []
    _, markdown, _ = report_of(results, tmp_path)
    settings = {cells[0]: cells for cells in table_titled(markdown, "Settings")}
    tuning = {cells[0]: cells for cells in table_titled(markdown, "Learning rates tried")}
    assert settings["Gemma 2"][2] == tuning["Gemma 2"][1] == tuning["Gemma 2"][3] == "-"
    assert settings["MoxE"][1:3] == ["as the scale says", "0.003"]


def test_a_best_learning_rate_at_the_edge_of_what_was_tried_is_said(tmp_path: Path):
    results = make_results(seeds=1)
    for name, chosen in (("moxe", 0.003), ("xlstm", 0.001), ("gemma2", 0.01)):
        row = row_named(results, name)
        row["tuning"] = [{"learning_rate": rate, "validation_loss": 4.0} for rate in (0.001, 0.003, 0.01)]
        row["learning_rate"] = chosen
    _, markdown, _ = report_of(results, tmp_path)
    places = {cells[0]: cells[3] for cells in table_titled(markdown, "Learning rates tried")}
    edge = "best at the edge of what was tried"
    assert [places[label] for label in ("MoxE", "xLSTM", "Gemma 2")] == ["within", edge, edge]


def test_parameters_are_told_as_a_part_of_those_of_moxe(tmp_path: Path):
    results = make_results(seeds=1)
    row_named(results, "xlstm")["parameters"] = round(1.035 * row_named(results, "moxe")["parameters"])
    _, markdown, _ = report_of(results, tmp_path)
    parts = {cells[0]: cells[2] for cells in table_titled(markdown, "Size, cost and loss at equal time")}
    assert (parts["MoxE"], parts["xLSTM"]) == ("100.0%", "103.5%")


@pytest.mark.parametrize(("device", "words"), [("cpu", "of the whole process"), ("cuda", "allocated on the GPU")])
def test_peak_memory_says_whose_it_is(device: str, words: str, tmp_path: Path):
    results = make_results(seeds=1)
    results["machine"]["device"] = device
    _, markdown, _ = report_of(results, tmp_path)
    assert f"Peak memory is {words}" in markdown


def test_routers_without_difficulty_have_no_2_gamma_and_without_mlstm_experts_no_share_of_them(tmp_path: Path):
    results = make_results(seeds=2)
    for run in row_named(results, "standard")["runs"]:
        layer = {"difficulty": None, "mlstm_share": 0.5, "share_with_rarity": {"value": 0.2}}
        run["analysis"] = {"gamma": GAMMA, "expert_kind": "mlstm", "layers": [layer]}
    _, markdown, _ = report_of(results, tmp_path)
    head, *body = table_titled(markdown, "Difficulty, odds and rarity by layer")
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in body}
    of_standard, of_moxe = cells["standard, layer 0"], cells["MoxE, layer 0"]
    assert (of_standard["2 gamma"], of_moxe["2 gamma"]) == ("-", f"{2 * GAMMA:g}")
    assert numbers(of_standard["share of group M"])[0] == 0.5
    column = "share of mLSTM experts with the rarity"
    assert of_standard[column] == "-"
    assert numbers(of_moxe[column])[0] == pytest.approx(0.3, abs=0.03)


def test_guessing_stands_below_the_models_of_table_1_alone(written: tuple[dict[str, Any], str, Page, Path]):
    _, _, _, folder = written
    (uniform, unigram) = table_titled((folder / "table1.md").read_text(encoding="utf-8"), "Validation loss")[-2:]
    assert (uniform[0], uniform[2], uniform[-1]) == ("all tokens alike (no model)", "8.3178", "3.1000")
    assert (unigram[0], unigram[2], unigram[-1]) == ("tokens by their frequency (no model)", "6.9000", "2.6000")
    assert "(no model)" not in (folder / "table2.md").read_text(encoding="utf-8")


def test_each_markdown_file_says_what_was_run_and_the_first_begins_with_the_claims(
    written: tuple[dict[str, Any], str, Page, Path],
):
    results, _, _, folder = written
    first, second = ((folder / name).read_text(encoding="utf-8") for name in ("table1.md", "table2.md"))
    for text in (first, second):
        head = text.split("\n##", 1)[0]
        for fact in ("scale: small", "moxe experiments --scale small", "text.txt", "cpu a CPU"):
            assert fact in head
    assert first.index("### The paper's claims") < first.index("## Table 1")
    assert len(table_titled(first, "The paper's claims")) == 1 + len(results["claims"])
    assert "The paper's claims" not in second


@pytest.mark.parametrize(("run", "other"), [("table1", "table2"), ("table2", "table1")])
def test_a_table_that_was_not_run_has_neither_section_nor_file_nor_figures(run: str, other: str, tmp_path: Path):
    results = make_results(seeds=1)
    results["rows"] = [row for row in results["rows"] if run in row["tables"]]
    for each in row_named(results, "moxe")["runs"]:
        each["analysis"] = None
    for name in ("table1.md", "table2.md"):
        (tmp_path / name).write_text("of an earlier report")
    _, markdown, page = report_of(results, tmp_path)
    assert (tmp_path / f"{run}.md").exists()
    assert not (tmp_path / f"{other}.md").exists()
    assert markdown.count("### Validation loss") == 1
    assert "### The paper's claims" in markdown
    assert (tmp_path / "figures" / "fig3a.png").exists() == (run == "table1")
    assert (tmp_path / "figures" / "forest.png").exists() == (run == "table2")
    assert ("Table 1 was not run" in page.text) == (run == "table2")
