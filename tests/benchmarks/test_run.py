"""`moxe bench`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moxe.benchmarks import QUESTIONS, run
from moxe.benchmarks.report import Report
from moxe.benchmarks.timing import Samples
from moxe.cli import main


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Answers at once instead of measuring; what was asked, in order."""
    calls: list[tuple] = []

    def ask(question: str, setting: str | None, *options) -> Report:
        calls.append((question, setting, *options))
        if question == "floor":
            return Report(question, "Floor", failed="a wrong gradient [1]")
        report = Report(question, f"Title of {question}", ["side", "ms"], check="all is well")
        report.add_row("MoxE", "1")
        report.add_timing("MoxE", Samples((0.001,)), largest_share=1.0)
        return report

    monkeypatch.setattr(run, "_ask", ask)
    monkeypatch.setattr(run, "draw_report", lambda report, folder: None)
    return calls


def test_a_question_is_measured_printed_and_kept(tmp_path: Path, capfd):
    out = tmp_path / "results"
    assert main(["bench", "skew", "--quick", "--repeats", "2", "--threads", "1", "--out", str(out)]) == 0
    printed = capfd.readouterr().out
    assert "Skew: forward and backward of the experts" in printed
    assert "experts in float64 against the reference" in printed
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["machine"]["threads"] == 1
    assert results["quick"] is True
    figures = results["questions"]["skew"]["figures"]
    assert [len(figure["samples"]) for figure in figures] == [2, 2]
    assert sorted(path.name for path in out.iterdir()) == ["results.json"]


def test_without_a_question_all_are_asked(asked, tmp_path, capsys):
    main(["bench", "--out", str(tmp_path / "results")])
    assert [question for question, *_ in asked] == ["training", *QUESTIONS]
    assert [setting for _, setting, *_ in asked][:2] == ["plain", "best"]
    assert {options for _, _, *options in asked for options in [tuple(options)]} == {(run.REPEATS, False, None, False)}


def test_options_reach_the_processes_that_measure(asked, tmp_path, capsys):
    folder = str(tmp_path / "results")
    assert main(["bench", "cells", "--quick", "--threads", "3", "--compile", "--out", folder]) == 0
    assert asked == [("cells", None, run.QUICK_REPEATS, True, 3, True)]


def test_a_question_that_failed_is_named_and_makes_the_exit_code_1(asked, tmp_path, capsys):
    out = tmp_path / "results"
    assert main(["bench", "floor", "skew", "--out", str(out)]) == 1
    assert "floor failed: a wrong gradient [1]" in capsys.readouterr().out
    kept = json.loads((out / "results.json").read_text(encoding="utf-8"))["questions"]
    assert kept["floor"]["failed"] == "a wrong gradient [1]"
    assert kept["skew"]["figures"]


def test_what_was_measured_before_an_interruption_is_kept(asked, tmp_path, capsys, monkeypatch):
    ask = run._ask

    def interrupted(question: str, *options) -> Report:
        if question == "length":
            raise KeyboardInterrupt
        return ask(question, *options)

    monkeypatch.setattr(run, "_ask", interrupted)
    out = tmp_path / "results"
    assert main(["bench", "skew", "length", "--out", str(out)]) == 130
    assert list(json.loads((out / "results.json").read_text(encoding="utf-8"))["questions"]) == ["skew"]


def test_an_unknown_question_is_refused_with_the_valid_ones(capsys, tmp_path):
    out = tmp_path / "results"
    assert main(["bench", "training", "speed", "--out", str(out)]) == 2
    captured = capsys.readouterr()
    valid = "training, cells, length, skew, floor, decoding"
    assert captured.err == f"moxe: there is no question 'speed': there are {valid}\n"
    assert captured.out == ""
    assert not out.exists()


def test_earlier_results_are_not_overwritten(capsys, tmp_path, asked):
    (tmp_path / "results.json").write_text("{}", encoding="utf-8")
    assert main(["bench", "skew", "--out", str(tmp_path)]) == 2
    assert "already holds results.json: choose another --out" in capsys.readouterr().err
    assert not asked


def test_a_folder_that_cannot_be_made_is_refused(capsys, tmp_path, asked):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main(["bench", "skew", "--out", str(tmp_path / "file" / "results")]) == 2
    assert "cannot be made: Not a directory" in capsys.readouterr().err
    assert not asked


def test_a_process_that_dies_is_reported_with_its_last_words(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    report = run._ask("training", "no such setting", 1, True, None, False)
    assert report.failed is not None
    assert report.failed.startswith("its process ended with code 2: ")
    assert "no such setting" in report.failed


def test_the_help_names_every_question(capsys):
    assert main(["bench", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, question in QUESTIONS.items():
        assert f"{name} {question}" in printed
