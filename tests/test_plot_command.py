"""`moxe plot` end to end: what it writes where, what it prints, and its one sentence for bad input."""

from __future__ import annotations

from pathlib import Path

import pytest

from moxe.cli import main
from moxe.recipe import load_recipe
from tests.observability.runs import write_run

OF_ONE_RUN = ("losses", "utilisation", "routing", "gradients", "speed")
OF_SEVERAL = ("losses", "speed", "routing", "utilisation")


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two settings of two seeds each as trainings leave them."""
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        for name, coefficient in (("full", 0.01), ("no-group", 0.0)):
            folder = Path("runs", f"{name}-{seed}")
            write_run(folder, 3, layers=1, shift=seed / 10)
            overrides = {"training": {"seed": seed, "name": folder.name}, "model": {"group_loss_coef": coefficient}}
            load_recipe("default", overrides).save(folder / "recipe.yaml")


def files(folder: str, names: tuple[str, ...]) -> list[str]:
    return [str(Path(folder, f"{name}.{suffix}")) for name in names for suffix in ("png", "svg")]


def everything() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


@pytest.mark.parametrize("run", ["runs/full-0", "runs/full-0/", "runs/full-0/metrics.jsonl"])
def test_the_pictures_of_a_run_go_into_its_folder(run: str, capsys: pytest.CaptureFixture[str]):
    before = everything()
    assert main(["plot", run]) == 0
    written = files("runs/full-0/plots", OF_ONE_RUN)
    assert capsys.readouterr().out == f"written: {', '.join(written)}\n"
    assert sorted({*everything()} - {*before}) == sorted(["runs/full-0/plots", *written])


def test_a_run_that_was_killed_while_it_wrote_a_line_can_be_drawn(capsys: pytest.CaptureFixture[str]):
    with Path("runs/full-0/metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    assert main(["plot", "runs/full-0", "--out", "one"]) == 0
    assert capsys.readouterr().out == f"written: {', '.join(files('one', OF_ONE_RUN))}\n"


def test_several_runs_share_their_axes_and_are_called_by_what_differs(capsys: pytest.CaptureFixture[str]):
    assert main(["plot", "runs/full-0", "runs/no-group-0", "runs/full-1", "runs/no-group-1"]) == 0
    assert capsys.readouterr().out == (
        "group_loss_coef=0.01: runs/full-0/metrics.jsonl, runs/full-1/metrics.jsonl\n"
        "group_loss_coef=0: runs/no-group-0/metrics.jsonl, runs/no-group-1/metrics.jsonl\n"
        f"written: {', '.join(files('plots', OF_SEVERAL))}\n"
    )
    assert sorted(map(str, Path("plots").iterdir())) == sorted(files("plots", OF_SEVERAL))
    picture = Path("plots/losses.svg").read_text(encoding="utf-8")
    assert "<!-- group_loss_coef=0.01 (2 runs) -->" in picture


def test_labels_say_what_belongs_together(capsys: pytest.CaptureFixture[str]):
    runs = ["all of it=runs/full-0", "all of it=runs/no-group-0", "rest=runs/full-1"]
    assert main(["plot", *runs, "--out", "figures"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "all of it: runs/full-0/metrics.jsonl, runs/no-group-0/metrics.jsonl",
        "rest: runs/full-1/metrics.jsonl",
    ]
    assert sorted(map(str, Path("figures").iterdir())) == sorted(files("figures", OF_SEVERAL))


def test_a_seed_that_ends_early_is_said_to_cut_the_line_of_its_setting(capsys: pytest.CaptureFixture[str]):
    write_run(Path("runs/full-1"), 2, layers=1)
    assert main(["plot", "runs/full-0", "runs/no-group-0", "runs/full-1"]) == 0
    ends = "where runs/full-1/metrics.jsonl ends; its longest run goes to step 3"
    assert capsys.readouterr().out.splitlines()[2] == f"group_loss_coef=0.01: drawn to step 2, {ends}"


def test_runs_that_log_at_other_intervals_are_no_seeds_of_one_setting(capsys: pytest.CaptureFixture[str]):
    recipe = Path("runs/full-1/recipe.yaml")
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("logging_steps: 10", "logging_steps: 5"))
    assert main(["plot", "runs/full-0", "runs/full-1"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "logging_steps=10: runs/full-0/metrics.jsonl",
        "logging_steps=5: runs/full-1/metrics.jsonl",
    ]


def test_what_is_printed_of_a_recipe_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]):
    for name, source in (("full-0", "a\x1b[2J"), ("full-1", "b\x1b[2J")):
        load_recipe("default", {"data": {"source": source}}).save(Path("runs", name, "recipe.yaml"))
    assert main(["plot", "runs/full-0", "runs/full-1"]) == 0
    assert capsys.readouterr().out.startswith("source=a\\x1b[2J: runs/full-0/metrics.jsonl\nsource=b\\x1b[2J: ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: [LABEL=]RUN (see moxe plot --help)"),
        (["runs/full-9"], "there is no run 'runs/full-9'"),
        (["runs/full-0", "x=runs/full-9"], "there is no run 'runs/full-9'"),
        (["runs"], "the folder 'runs' holds no metrics.jsonl"),
        (["=runs/full-0", "runs/full-1"], "the label in '=runs/full-0' is empty"),
        (["full=runs/full-0"], "the label 'full' tells runs apart: give several runs, or leave it out"),
        (["runs/full-0", "runs/full-0"], "is given twice"),
        (["empty"], "holds no training line to draw"),
        (["runs/full-0", "empty"], "holds no training line to draw"),
        (["damaged"], "line 2 of damaged/metrics.jsonl is no JSON object"),
        (["runs/full-0", "damaged"], "line 2 of damaged/metrics.jsonl is no JSON object"),
        (["runs/full-0", "--out", "empty/metrics.jsonl"], "empty/metrics.jsonl"),
        (["runs/full-0", "--model.gamma", "1"], "moxe plot does not take '--model.gamma'"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
):
    for name, content in (("empty", ""), ("damaged", '{"step": 1, "layers": []}\n[1]\n')):
        Path(name).mkdir()
        Path(name, "metrics.jsonl").write_text(content, encoding="utf-8")
    before = everything()
    assert main(["plot", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moxe: ")
    assert captured.err.count("\n") == 1
    assert sentence in captured.err
    assert everything() == before


def test_its_help_shows_how_to_compare_settings(capsys: pytest.CaptureFixture[str]):
    assert main(["plot", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: moxe plot ")
    assert "full=runs/a full=runs/b" in text
    assert "default: RUN/plots" in " ".join(text.split())
