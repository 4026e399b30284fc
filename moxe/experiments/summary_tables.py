"""The tables of the report as rows of text, and as Markdown; the page shows the same text."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moxe.experiments.measures import MEASURES, Measure, diverged, peak_memory, trained_on_gpu
from moxe.experiments.theory import LayerEstimate, expected_slope, routing_quantities
from moxe.experiments.wall_clock import has_others, members_of

_NOTHING = "-"
_MEASURES = {measure.key: measure for measure in MEASURES}
_GUESSING = {"uniform": "all tokens alike", "unigram": "tokens by their frequency"}
_TITLES = {
    "table1": "Table 1: the four models",
    "table2": "Table 2: MoxE with one part removed",
    "ours": "Beside the paper: our baselines",
    "options": "Options of the model",
    "gamma": "The strength of the bias",
}


@dataclass(frozen=True)
class Table:
    """A table to read.

    Args:
        title: what stands above it.
        columns, rows: its text; the first column names the row.
        note: what stands below it.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def to_markdown(self) -> str:
        lines = [_markdown_row(self.columns), "|---" * len(self.columns) + "|", *map(_markdown_row, self.rows)]
        return "\n".join([f"### {self.title}", "", *lines, *(["", self.note] if self.note else [])])


@dataclass(frozen=True)
class Section:
    """The tables of one part of the experiments, and what did not come to its end there."""

    name: str
    title: str
    tables: list[Table]
    unfinished: list[str] = field(default_factory=list)

    def to_markdown(self) -> str:
        parts = [f"## {self.title}", *(table.to_markdown() for table in self.tables)]
        if self.unfinished:
            bullets = [f"- {markdown_text(sentence)}" for sentence in self.unfinished]
            parts.append("\n".join(["### Runs without a number", "", *bullets]))
        return "\n\n".join(parts) + "\n"


def build_sections(results: dict[str, Any]) -> list[Section]:
    """The sections in the order of their first rows, Table 1 and Table 2 in front, without those of MoxE alone.

    Args:
        results: with the statistics of `moxe.experiments.statistics.add_statistics`.
    """
    names = dict.fromkeys(row["section"] for row in results["rows"])
    front = [name for name in ("table1", "table2") if name in names]
    members = {name: members_of(results["rows"], name) for name in dict.fromkeys([*front, *names])}
    sections = [_section(results, name, rows) for name, rows in members.items() if has_others(rows)]
    routing = _routing_table(results["rows"])
    return [*sections, Section("routing", "What the routers do", [routing])] if routing.rows else sections


def _section(results: dict[str, Any], name: str, rows: Sequence[dict[str, Any]]) -> Section:
    tables = [
        _loss_table(results, rows, results["guessing"] if name == "table1" else {}),
        _cost_table(results, name, rows),
        _settings_table(rows),
    ]
    if any(row["summary"][key]["n"] for row in rows for key in _MEASURES if key.startswith("lambada")):
        tables.insert(1, _last_word_table(results, rows))
    if any(row["tuning"] for row in rows):
        tables.append(_tuning_table(rows))
    unfinished = [sentence for row in rows for sentence in _unfinished(row)]
    return Section(name, _TITLES.get(name, name), tables, unfinished)


def claims_table(results: dict[str, Any]) -> Table:
    """The paper's claims with their verdicts; without a row if no row is full MoxE."""
    judged = [[claim["claim"], claim["verdict"], claim["because"]] for claim in results["claims"]]
    note = "" if judged else "No row is full MoxE, so no claim can be judged."
    return Table("The paper's claims", ["claim", "verdict", "because"], judged, note)


def _loss_table(results: dict[str, Any], rows: Sequence[dict[str, Any]], guessing: dict[str, Any]) -> Table:
    """Below the models what guessing costs: `guessing` by its kind."""
    measure = _MEASURES["validation_loss"]
    margin = results["margins"]["validation_loss"]
    columns = [
        "model",
        "seeds",
        "validation loss, nats a token",
        "difference to MoxE",
        "verdict",
        "Holm p",
        f"p of equivalence within {margin:g}",
        "detectable",
        "bits a byte",
    ]
    table = []
    for row in rows:
        compared = row["against_moxe"].get(measure.key)
        table.append(
            [
                row["label"],
                _seeds(row),
                _mean(row, measure.key),
                _difference(compared, measure),
                *_judgement(compared, measure),
                _mean(row, "bits_per_byte"),
            ]
        )
    for kind, known in guessing.items():
        nats, bits = _number(known["nats_per_token"], measure.digits), _number(known["bits_per_byte"], 4)
        table.append([f"{_GUESSING.get(kind, kind)} (no model)", _NOTHING, nats, *[_NOTHING] * 5, bits])
    note = (
        "Mean over seeds ± half its 95% t-interval; differences are paired by seed. Holm's p is over the rows of a "
        "section; the p of equivalence is not adjusted. Detectable is the true difference that one test at 5%, without "
        "Holm's correction, finds with 80% power at this number of seeds and this spread: a verdict can need more."
    )
    return Table("Validation loss", columns, table, note)


def _last_word_table(results: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Table:
    word, token = _MEASURES["lambada_perplexity"], _MEASURES["lambada_token_perplexity"]
    columns = [
        "model",
        "seeds",
        "perplexity of the last word",
        "the paper's",
        "times that of MoxE",
        "the paper's times",
        "verdict",
        "Holm p",
        f"p of equivalence within {results['margins'][word.key]:.0%}",
        "detectable",
        "perplexity of the last token",
        "times that of MoxE",
        "verdict",
        "accuracy",
        "difference to MoxE",
        "verdict",
    ]
    accuracy = _MEASURES["lambada_accuracy"]
    table = []
    for row in rows:
        against = row["against_moxe"]
        paper = row["paper"]
        change = paper.get("change_percent")
        table.append(
            [
                row["label"],
                _count(row, word.key),
                _mean(row, word.key),
                _NOTHING if paper.get("lambada_perplexity") is None else f"{paper['lambada_perplexity']:,.2f}",
                _difference(against.get(word.key), word),
                _NOTHING if change is None else f"{1 + change / 100:.2f}",
                *_judgement(against.get(word.key), word),
                _mean(row, token.key),
                _difference(against.get(token.key), token),
                _verdict(against.get(token.key)),
                _mean(row, accuracy.key),
                _difference(against.get(accuracy.key), accuracy),
                _verdict(against.get(accuracy.key)),
            ]
        )
    note = (
        "Perplexities: geometric mean over seeds with its 95% interval, compared by ratios. Holm's p, equivalence "
        "and what is detectable: as for the validation loss."
    )
    return Table("Last words (LAMBADA)", columns, table, note)


def _milliseconds(seconds: float | None) -> str:
    return _NOTHING if seconds is None else f"{1000 * seconds:.2f}"


def _cost_table(results: dict[str, Any], section: str, rows: Sequence[dict[str, Any]]) -> Table:
    labels = {row["name"]: row["label"] for row in results["rows"]}
    common = results["equal_time"][section]
    finished = {point["name"]: point for point in common["finished"]}
    reference = next((row for row in rows if row["is_reference"]), None)
    columns = [
        "model",
        "parameters",
        "of MoxE's",
        "the paper's",
        "active",
        "active FLOPs a token",
        "tokens/s alone",
        "ms a generated token",
        "tokens/s in training",
        "peak memory, MB",
        "seconds a run",
        *(f"loss when {labels[at['row']]} had finished ({at['seconds']:,.0f} s)" for at in common["at"]),
        "on the front",
    ]
    table = []
    for row in rows:
        paper = row["paper"].get("parameters")
        point = finished.get(row["name"])
        peak = peak_memory(row)
        table.append(
            [
                row["label"],
                f"{row['parameters']:,}",
                _NOTHING if reference is None else f"{row['parameters'] / reference['parameters']:.1%}",
                _NOTHING if paper is None else f"{paper / 1e6:g}M",
                f"{row['active_parameters']:,}",
                f"{row['flops_per_token']:,}",
                f"{row['speed']['tokens_per_second']:,.0f}" if row.get("speed") else _NOTHING,
                _milliseconds((row.get("speed") or {}).get("seconds_a_generated_token")),
                _mean(row, "tokens_per_second"),
                _NOTHING if peak is None else f"{peak / 1e6:,.0f}",
                f"{point['seconds']:,.0f}" if point else _NOTHING,
                *(_plus_minus(at["losses"].get(row["name"]), 4) for at in common["at"]),
                ("yes" if point["on_front"] else "no") if point else _NOTHING,
            ]
        )
    memory = (
        "allocated on the GPU" if trained_on_gpu(results) else "of the whole process, libraries included (some 500 MB)"
    )
    note = (
        "Active FLOPs are those of a forward pass, with attention at its mean context within a row. Peak memory is "
        f"{memory}. Seconds a run follow from the speed alone if every row that finished was timed so, else from the "
        "runs. Losses at a common time are read off a row's own curve, where its learning rate is not annealed, and "
        "linearly between validations, which lies above a convex curve (here by up to about 0.02 nats): both flatter "
        "the rows that had finished, the fast ones. A row is on the front if none is both as fast and as good."
    )
    return Table("Size, cost and loss at equal time", columns, table, note)


def _settings_table(rows: Sequence[dict[str, Any]]) -> Table:
    def settings(row: dict[str, Any]) -> str:
        return ", ".join(f"{key}={value}" for key, value in sorted(row["settings"].items())) or "as the scale says"

    table = [[row["label"], settings(row), _learning_rate(row), row["note"]] for row in rows]
    return Table("Settings", ["model", "settings", "learning rate", "note"], table)


def _tuning_table(rows: Sequence[dict[str, Any]]) -> Table:
    def tried(row: dict[str, Any]) -> str:
        return "; ".join(f"{one['learning_rate']:g}: {_number(one['validation_loss'], 4)}" for one in row["tuning"])

    tuned = [[row["label"], _learning_rate(row), tried(row), _edge(row)] for row in rows if row["tuning"]]
    columns = ["model", "chosen", "tried, with the validation loss", "place of the best"]
    note = "Where the best is at the edge of what was tried, a rate beyond it might be better still."
    return Table("Learning rates tried", columns, tuned, note)


def _learning_rate(row: dict[str, Any]) -> str:
    """None while the model is still being tuned."""
    return _NOTHING if row["learning_rate"] is None else f"{row['learning_rate']:g}"


def _edge(row: dict[str, Any]) -> str:
    rates = [one["learning_rate"] for one in row["tuning"]]
    if row["learning_rate"] is None:
        return _NOTHING
    return "best at the edge of what was tried" if row["learning_rate"] in (min(rates), max(rates)) else "within"


def _routing_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One row a layer of every model that was analysed."""
    found = {row["name"]: routing_quantities(row) for row in rows}
    names = list(dict.fromkeys(name for quantities in found.values() for name in quantities))
    table = []
    for row in rows:
        quantities = found[row["name"]]
        expected = expected_slope(row)
        for layer in sorted({one.layer for estimates in quantities.values() for one in estimates}):
            cells = [next((one for one in quantities.get(name, []) if one.layer == layer), None) for name in names]
            two_gamma = _NOTHING if expected is None else f"{expected:g}"
            table.append([f"{row['label']}, layer {layer}", two_gamma, *(map(_layer_cell, cells))])
    note = (
        "Means over seeds with their 95% intervals; with one seed the interval of its own text. d is the difficulty; "
        '"with" is a rank correlation. Group M is the first half of the experts: the mLSTM experts if the model has '
        "experts of both kinds."
    )
    return Table("Difficulty, odds and rarity by layer", ["model and layer", "2 gamma", *names], table, note)


def _layer_cell(found: LayerEstimate | None) -> str:
    return _NOTHING if found is None else f"{found.mean:.3f}" + _interval(asdict(found), "{:.3f}".format)


def _unfinished(row: dict[str, Any]) -> list[str]:
    sentences = []
    for run in row["runs"]:
        if run["status"] != "done":
            why = f": {run['error']}" if run.get("error") else ""
            sentences.append(f"{row['label']}, seed {run['seed']}: {run['status']}{why}")
        elif diverged(run):
            sentences.append(f"{row['label']}, seed {run['seed']}: diverged, its loss is {run['validation_loss']:g}")
    return sentences


def _seeds(row: dict[str, Any]) -> str:
    counts = row["counts"]
    others = [f"{counts[kind]} {kind}" for kind in ("diverged", "failed", "missing") if counts[kind]]
    return f"{counts['done']} of {len(row['runs'])} ({', '.join(others)})" if others else f"{counts['done']}"


def _count(row: dict[str, Any], key: str) -> str:
    return f"{row['summary'][key]['n']}"


def _mean(row: dict[str, Any], key: str) -> str:
    measure, summary = _MEASURES[key], row["summary"][key]
    if not summary["n"]:
        return _NOTHING
    if not measure.logarithmic:
        return _plus_minus(summary, measure.digits)
    return _number(summary["mean"], measure.digits) + _interval(summary, lambda value: _number(value, measure.digits))


def _plus_minus(summary: dict[str, Any] | None, digits: int) -> str:
    if summary is None:
        return _NOTHING
    half = "" if summary["low"] is None else f" ± {_number((summary['high'] - summary['low']) / 2, digits)}"
    return f"{_number(summary['mean'], digits)}{half}"


def _difference(compared: dict[str, Any] | None, measure: Measure) -> str:
    if compared is None or compared["mean"] is None:
        return _NOTHING

    def show(value: float) -> str:
        return f"{value:,.3f}" if measure.logarithmic else f"{value:+z.{measure.digits}f}"

    return show(compared["mean"]) + _interval(compared, show)


def _interval(value: dict[str, Any], show: Callable[[float], str]) -> str:
    return "" if value["low"] is None else f" [{show(value['low'])}, {show(value['high'])}]"


def _judgement(compared: dict[str, Any] | None, measure: Measure) -> list[str]:
    """Verdict, Holm's p, the p of equivalence and what could have been found."""
    if compared is None:
        return [_NOTHING] * 4
    detectable = compared["detectable"]
    times = " times" if measure.logarithmic else ""
    return [
        _verdict(compared),
        _p_value(compared["holm_p"]),
        _p_value(compared["equivalence_p"]),
        _NOTHING
        if detectable is None
        else f"{_number(detectable, 3 if measure.logarithmic else measure.digits)}{times}",
    ]


def _verdict(compared: dict[str, Any] | None) -> str:
    if compared is None:
        return _NOTHING
    return f"not tested: {compared['why_untested']}" if compared["why_untested"] else compared["verdict"]


def _p_value(p: float | None) -> str:
    if p is None:
        return _NOTHING
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return _NOTHING
    return f"{value:,.{digits}f}" if math.isfinite(value) else f"{value:g}"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(markdown_text, cells)) + " |"


def markdown_text(text: str) -> str:
    """Inert: no markup of HTML, no link, no further cell, no further line."""
    escaped = html.escape(text, quote=False).replace("\\", "\\\\").replace("|", "\\|").replace("](", "]\\(")
    return " ".join(escaped.split())
