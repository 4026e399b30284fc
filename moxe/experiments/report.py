"""The report of the experiments: the numbers, the paper's tables, the figures, and one page that holds it all."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from moxe.experiments.figures import Drawing, Undrawn, draw_figures
from moxe.experiments.results_file import write_results
from moxe.experiments.summary_tables import Section, build_sections, claims_table, markdown_text
from moxe.files import write_whole

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_TEXTS = {
    "table1.md": "The paper's experiments, measured: Table 1",
    "table2.md": "The paper's experiments, measured: Table 2 and beyond",
}


def write_report(results: dict[str, Any], out: Path) -> list[Path]:
    """Write results.json, table1.md, table2.md (with all further sections), figures/ and report.html.

    A table that was not run has no file. The claims stand at the top of table1.md, else of table2.md.
    report.html is one file that asks for nothing else: it opens without a network, in the light or the dark.

    Args:
        results: with the statistics of `moxe.experiments.statistics.add_statistics`.
        out: the folder; made if it is not there. Files of an earlier report are replaced.

    Returns:
        The files written.
    """
    sections = build_sections(results)
    drawings, undrawn = draw_figures(results)
    page = _page(results, sections, drawings, undrawn)
    texts = _markdown_files(results, sections)
    figures = out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for figure in undrawn:
        for ending in ("png", "svg"):
            (figures / f"{figure.name}.{ending}").unlink(missing_ok=True)
    for name in _TEXTS.keys() - texts.keys():
        (out / name).unlink(missing_ok=True)
    contents: dict[Path, str | bytes] = {
        **{out / name: text for name, text in texts.items()},
        **{figures / f"{drawing.name}.png": drawing.png for drawing in drawings},
        **{figures / f"{drawing.name}.svg": drawing.svg for drawing in drawings},
        out / "report.html": page,
    }
    write_results(results, out / "results.json")
    for path, content in contents.items():
        write_whole(path, content)
    return [out / "results.json", *contents]


def _markdown_files(results: dict[str, Any], sections: list[Section]) -> dict[str, str]:
    """By name the text of each file that has a section; the first has the claims too."""
    head = "\n".join(f"- {name}: {markdown_text(value)}" for name, value in _facts(results))
    texts: dict[str, str] = {}
    for name, title in _TEXTS.items():
        of_file = [section for section in sections if (section.name == "table1") == (name == "table1.md")]
        if of_file:
            claims = [] if texts else [claims_table(results).to_markdown() + "\n"]
            texts[name] = "\n".join([f"# {title}\n\n{head}\n", *claims, *(one.to_markdown() for one in of_file)])
    return texts


def _page(results: dict[str, Any], sections: list[Section], drawings: list[Drawing], undrawn: list[Undrawn]) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        facts=_facts(results),
        claims=claims_table(results),
        sections=sections,
        drawings=drawings,
        undrawn=undrawn,
        methods=_methods(results["margins"]),
        tone=_tone,
        data_uri=_data_uri,
    )


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What was run, on what and where."""
    data, lambada = results["data"], results["data"]["lambada"]
    guessing = "; ".join(
        f"{kind}: {known['nats_per_token']:.4f} nats a token, {known['bits_per_byte']:.4f} bits a byte"
        for kind, known in sorted(results["guessing"].items())
    )
    return [
        ("scale", results["scale"]),
        ("seeds", ", ".join(map(str, results["seeds"]))),
        ("training text", data["source"]),
        ("validation text", data["validation"] or "held out from the training text"),
        ("last words", f"{lambada['source']}, {lambada['examples']:,} examples" if lambada else "not measured"),
        ("a run", f"{data['tokens_a_run']:,} tokens in sequences of {data['sequence_length']:,}"),
        ("vocabulary", f"{data['vocab_size']:,}"),
        ("guessing", guessing),
        ("machine", ", ".join(f"{name} {value}" for name, value in sorted(results["machine"].items()))),
        ("moxe", results["moxe"]),
        ("command", results["command"]),
    ]


def _methods(margins: dict[str, float]) -> list[str]:
    return [
        "The unit of replication is the seed: it fixes the order of the data and its windows for every row alike, so "
        "rows are compared in pairs of one seed. Initial weights are the same only for rows with the same parameters "
        "in the same order. Intervals are Student's, of 95%; one seed has none. They cover the seed alone, not the "
        "choice of the held-out text, on which the learning rates were chosen too.",
        "Only the models of Table 1 had their learning rates tuned, each with the same budget. All rows of Table 2 and "
        "below that are changes of MoxE take the learning rate tuned for full MoxE, which favours MoxE.",
        "A row is better or worse than full MoxE if the paired t-test, corrected after Holm over the rows of its "
        "section, has a p below 5%; equivalent if two one-sided tests show at 5% that the difference is within the "
        f"margin: {margins['validation_loss']:g} nats a token, {margins['bits_per_byte']:g} bits a byte, "
        f"{margins['lambada_perplexity']:.0%} of the perplexity of a last word, "
        f"{margins['lambada_token_perplexity']:.0%} of that of a last token, {margins['lambada_accuracy']:g} of the "
        f"accuracy, {margins['tokens_per_second']:.0%} of the speed. "
        "Otherwise no difference was found, which is not to say that there is none: see what was detectable. That is "
        "computed for one test at 5%, while a verdict takes Holm's p, so that it can need a larger difference; the "
        "p values of equivalence are not adjusted for their number.",
        "Perplexities and speeds are averaged and compared as logarithms. Runs that diverged, failed or are missing "
        "enter no mean; they are listed, and a row without its diverged runs looks better than it is.",
    ]


def _tone(text: str) -> str:
    if text.startswith(("better", "holds")):
        return "good"
    return "bad" if text.startswith(("worse", "does not hold")) else ""


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
