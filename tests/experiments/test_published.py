"""docs/results.md says what the published results.json say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moxe.experiments.results_file import read_results

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "results.md").read_text(encoding="utf-8")
SMALL, PAPER = (read_results(DOCS / "results" / scale / "results.json") for scale in ("small", "paper"))
ROWS = {
    "xLSTM[5:1]": "xlstm",
    "Gemma 2": "gemma2",
    "Qwen1.5-MoE": "qwen2_moe",
    "Llama (not in the paper)": "llama",
    "MoxE-Standard (no difficulty, γ = 0)": "standard",
    "MoxE-No-Group-Loss": "no-group-loss",
    "xLSTM-MoE, as released": "ffn-released",
    "mLSTM-MoxE": "mlstm-experts",
    "sLSTM-MoxE": "slstm-experts",
    "dense xLSTM of equal active blocks": "xlstm-active",
    "experts without memory (as released)": "token-memory",
    "feed-forward experts, with norm and residual": "ffn",
    "group loss (P_M - P_S)²": "group-squared-difference",
    "group loss, Jensen-Shannon": "group-jensen-shannon",
    "feed-forward part in mLSTM experts": "mlstm-ffn",
    "difficulty of the token's own loss": "token-loss-target",
    "entropy target without gradient": "detached-target",
    "a shared feed-forward expert": "shared-expert",
    "balanced by bias": "bias-balancing",
}


def row(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in results["rows"] if row["name"] == name)


def line(label: str, within: str) -> str:
    """The line of a table whose first cell is this label."""
    (found,) = re.findall(rf"^\| (?:\*\w+:\* )?{re.escape(label)} \|.*$", within, flags=re.MULTILINE)
    return found


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("label", ROWS)
def test_a_row_of_the_page_is_the_one_of_the_results(label: str):
    tables = section("Table 1") + section("Table 2")
    text, found = line(label, tables), row(SMALL, ROWS[label])
    loss, word = (found["against_moxe"][measure] for measure in ("validation_loss", "lambada_perplexity"))
    assert f"{loss['mean']:+.3f} [{loss['low']:+.3f}, {loss['high']:+.3f}]" in text
    assert loss["verdict"] in text
    if ratio := re.search(r"(\d+\.\d+) \[(\d+\.\d+), (\d+\.\d+)\]", text.split("[", 2)[-1].partition("|")[2]):
        expected = [word[key] for key in ("mean", "low", "high")]
        assert [float(number) for number in ratio.groups()] == pytest.approx(expected, abs=0.0051)


@pytest.mark.parametrize("label", ["MoxE", "xLSTM[5:1]", "Gemma 2", "Qwen1.5-MoE", "Llama (not in the paper)"])
def test_losses_and_speeds_of_table_1_are_those_of_the_results(label: str):
    text, found = line(label, section("Table 1")), row(SMALL, ROWS.get(label, "moxe"))
    loss, speed = found["summary"]["validation_loss"], found["speed"]
    assert f"{loss['mean']:.3f} ± {(loss['high'] - loss['low']) / 2:.3f}" in text
    assert f"{found['parameters'] / 1e6:.2f}M | {found['flops_per_token'] / 1e6:.1f}M" in text
    assert f"{speed['tokens_per_second']:,.0f} | {1000 * speed['seconds_a_generated_token']:.2f}" in text


@pytest.mark.parametrize(
    ("label", "key", "digits", "kind"),
    [
        ("slope of log(P_M / P_S) on d (2γ = 1.4)", ("difficulty", "odds_slope", "value"), 1, "f"),
        ("rank correlation of d with the router's entropy", ("difficulty", "with_entropy", "value"), 2, "f"),
        ("with the token's loss", ("difficulty", "with_loss", "value"), 2, "f"),
        ("with the token's rarity", ("difficulty", "with_rarity", "value"), 2, "f"),
        ("rank correlation of that share with rarity", ("share_with_rarity", "value"), 2, "f"),
        ("variance of d explained by the input token alone", ("difficulty", "identity_share"), 0, "%"),
        ("share of assignments that go to mLSTM experts", ("mlstm_share", "value"), 0, "%"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_theory_of_the_page_is_that_of_the_results(label: str, key: tuple[str, ...], digits: int, kind: str):
    cells = line(label, section("The theory on trained models")).split("|")[2:-1]
    for layer, cell in enumerate(cells):
        values = []
        for run in row(SMALL, "moxe")["runs"]:
            value: Any = run["analysis"]["layers"][layer]
            for name in key:
                value = value[name]
            values.append(value)
        assert f"{np.mean(values):.{digits}{kind}}" == cell.split("(")[0].strip()


@pytest.mark.parametrize("name", ["xlstm", "moxe", "gemma2", "llama", "qwen2_moe"])
def test_the_papers_size_on_the_page_is_that_of_the_results(name: str):
    found = row(PAPER, name)
    text = line({"moxe": "MoxE", "llama": "Llama"}.get(name, found["label"]), section("At the paper's size"))
    (run,) = found["runs"]
    assert f"| {found['parameters'] / 1e6:.1f}M | {run['validation_loss']:.3f} |" in text
    assert f"| {run['tokens_per_second']:,.0f} | {run['peak_memory_bytes'] / 1e9:.1f} GB |" in text
