"""Which runs are seeds of one setting, what a setting is called, and how a command line names a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moxe.errors import UserError
from moxe.recipe import load_recipe
from moxe.training.settings import find_run, group_by_setting


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes the folder of a run, relative to the working folder; `training__seed=1` sets training.seed."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, recipe: str | None = "default", **settings: Any) -> Path:
        path = Path(name)
        path.mkdir(parents=True)
        (path / "metrics.jsonl").touch()
        if recipe is not None:
            overrides: dict[str, dict[str, Any]] = {"training": {"name": path.name, "output_dir": str(path.parent)}}
            for dotted, value in settings.items():
                section, key = dotted.split("__")
                overrides.setdefault(section, {})[key] = value
            load_recipe(recipe, overrides).save(path / "recipe.yaml")
        return path

    return make


def grouped(*texts: str) -> dict[str, list[str]]:
    """By label the folders of the runs."""
    groups = group_by_setting([find_run(text) for text in texts])
    return {label: [str(path.parent) for path in paths] for label, paths in groups.items()}


# What a command line names


def test_a_run_is_a_folder_or_a_metrics_file(runs):
    runs("runs/a")
    (Path("runs/a") / "metrics.jsonl").rename("runs/a/old.jsonl")
    (Path("runs/a") / "metrics.jsonl").touch()
    assert find_run("runs/a").metrics == find_run("runs/a/metrics.jsonl").metrics == Path("runs/a/metrics.jsonl")
    assert [find_run(text).name for text in ("runs/a", "runs/a/metrics.jsonl", "runs/a/old.jsonl")] == ["a", "a", "old"]


@pytest.mark.parametrize(
    ("text", "label", "folder"),
    [
        ("full=runs/a", "full", "runs/a"),
        (" full = runs/a", "full", None),
        ("runs/lr=3", None, "runs/lr=3"),
        ("a=runs/lr=3", "a", "runs/lr=3"),
        ("lr=3=runs/a", "lr=3", "runs/a"),
        ("lr=3=runs/lr=3", "lr=3", "runs/lr=3"),
        ("no group loss=runs/a/metrics.jsonl", "no group loss", "runs/a"),
    ],
)
def test_a_label_stands_before_the_run_and_either_may_hold_an_equals_sign(runs, text, label, folder):
    runs("runs/a")
    runs("runs/lr=3")
    if folder is None:
        with pytest.raises(UserError, match="there is no run ' runs/a'"):
            find_run(text)
        return
    run = find_run(text)
    assert (run.label, str(run.metrics.parent)) == (label, folder)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("runs/b", "there is no run 'runs/b': a run folder, such as runs/default, or a metrics.jsonl is expected"),
        ("full=runs/b", "there is no run 'runs/b'"),
        ("full=", "there is no run ''"),
        ("", "there is no run ''"),
        ("a\0b", "there is no run 'a.x00b'"),
        ("=runs/a", "the label in '=runs/a' is empty: write LABEL=RUN"),
        (" =runs/a", "the label in ' =runs/a' is empty"),
        ("runs", "the folder 'runs' holds no metrics.jsonl"),
        ("x=runs", "the folder 'runs' holds no metrics.jsonl"),
    ],
)
def test_what_is_no_run_is_refused(runs, text, sentence):
    runs("runs/a")
    with pytest.raises(UserError, match=sentence):
        find_run(text)


# Seeds of one setting


def test_runs_that_differ_in_seed_name_place_and_validation_are_seeds_of_one_setting(runs):
    runs("runs/full-0")
    runs("elsewhere/full-1", training__seed=1, training__save_steps=3, training__eval_steps=7, data__cache_dir="/c")
    assert grouped("runs/full-0", "elsewhere/full-1") == {"full": ["runs/full-0", "elsewhere/full-1"]}


@pytest.mark.parametrize(
    ("setting", "labels"),
    [
        ({"model__group_loss_coef": 0.0}, ["group_loss_coef=0.01", "group_loss_coef=0"]),
        ({"training__learning_rate": 1e-4}, ["learning_rate=0.003", "learning_rate=0.0001"]),
        ({"model__backend": "cpu"}, ["backend=auto", "backend=cpu"]),
        ({"training__num_threads": 1}, ["num_threads=None", "num_threads=1"]),
        # A line is the mean over the steps since the last one: those of other spans have no mean of their own.
        ({"training__logging_steps": 5}, ["logging_steps=10", "logging_steps=5"]),
        (
            {"model__gamma": 0.0, "model__router_bias": False},
            ["gamma=0.7, router_bias=True", "gamma=0, router_bias=False"],
        ),
    ],
)
def test_settings_are_called_by_what_tells_them_apart(runs, setting, labels):
    for seed in range(2):
        runs(f"a-{seed}", training__seed=seed)
        runs(f"b-{seed}", training__seed=seed, **setting)
    assert grouped("a-0", "b-1", "b-0", "a-1") == {labels[0]: ["a-0", "a-1"], labels[1]: ["b-1", "b-0"]}


def test_one_key_of_two_sections_is_called_by_its_section(runs):
    runs("a", model__vocab_size=5000)
    runs("b", model__vocab_size=600, data__vocab_size=600)
    assert list(grouped("a", "b")) == [
        "model.vocab_size=5000, data.vocab_size=4096",
        "model.vocab_size=600, data.vocab_size=600",
    ]


def test_settings_that_differ_in_much_are_called_by_their_folders(runs):
    for seed in range(2):
        runs(f"moxe-seed{seed}-3fe{seed}", training__seed=seed)
        runs(f"long_{seed}", training__seed=seed, data__source="a/place/whose/name/is/longer/than/48/letters.txt")
    runs("dense", recipe="xlstm-338m")
    names = ["moxe-seed0-3fe0", "long_0", "dense", "long_1", "moxe-seed1-3fe1"]
    assert grouped(*names) == {"moxe": [names[0], names[4]], "long": [names[1], names[3]], "dense": ["dense"]}


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["full-0", "full-1"], "full"),
        (["full-10", "full-11"], "full"),
        (["gamma-1.4-seed0", "gamma-1.4-seed1"], "gamma-1.4"),
        (["v2", "v2"], "v2"),
        (["0", "1"], "0"),
        (["seed0", "seed1"], "seed0"),
    ],
)
def test_seeds_are_called_by_what_their_folders_have_in_common(runs, names, label):
    paths = [str(runs(f"{place}/{name}", training__seed=place)) for place, name in enumerate(names)]
    assert grouped(*paths) == {label: paths}


def test_a_run_without_recipe_is_a_setting_of_its_own(runs):
    runs("a", recipe=None)
    runs("b", recipe=None)
    runs("c")
    runs("d", model__gamma=0.0)
    assert grouped("a", "b", "c", "d") == {name: [name] for name in "abcd"}


def test_the_recipe_of_a_folder_is_not_that_of_another_file_in_it(runs):
    path = runs("a")
    (path / "before.jsonl").touch()
    groups = group_by_setting([find_run("a"), find_run("a/before.jsonl")])
    assert groups == {"a": [path / "metrics.jsonl"], "before": [path / "before.jsonl"]}


def test_folders_of_one_name_are_called_by_their_paths(runs):
    runs("one/a", recipe=None)
    runs("two/a", recipe=None)
    assert grouped("one/a", "two/a") == {"one/a": ["one/a"], "two/a": ["two/a"]}


def test_a_label_wins_over_the_recipe(runs):
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        runs(name, training__seed=seed)
    runs("d", model__gamma=0.0)
    assert grouped("mine=a", "b", "mine=d", "c") == {"mine": ["a", "d"], "b": ["b", "c"]}


def test_runs_with_a_label_need_no_recipe_that_can_be_read(runs):
    (runs("a") / "recipe.yaml").write_text("model: {gama: 1}")
    runs("b")
    assert grouped("one=a", "two=b") == {"one": ["a"], "two": ["b"]}
    with pytest.raises(UserError, match=r"a/recipe.yaml: .*did you mean 'gamma'\?; LABEL=a does without it"):
        grouped("a", "b")


def test_a_name_that_is_another_runs_label_gives_way_to_the_path(runs):
    runs("runs/a")
    runs("runs/b", model__gamma=0.0)
    runs("runs/c", model__gamma=1.0)
    assert grouped("a=runs/b", "runs/a") == {"a": ["runs/b"], "runs/a": ["runs/a"]}
    with pytest.raises(UserError, match="'runs/a' is the label of a run, and a run without a label"):
        grouped("runs/a=runs/b", "a=runs/c", "runs/a")


def test_a_run_that_is_given_twice_is_refused(runs):
    runs("a")
    for texts in (("a", "a"), ("a", "./a/metrics.jsonl"), ("x=a", "y=a")):
        with pytest.raises(UserError, match=r"the run .*/a/metrics\.jsonl is given twice"):
            grouped(*texts)
