"""Keys, learning rates and folders of the runs behind a table."""

from __future__ import annotations

import dataclasses

import pytest

from moxe.experiments.grid import TUNING_SEED, deciding_settings
from moxe.experiments.tables import ROWS, rows_of
from tests.experiments.conftest import DATA

MOXE = rows_of("table1")[0]


def folder(grid, row=MOXE, rate=3e-3, seed=0) -> str:
    return grid.seed_runs(row, rate)[seed].folder.name


def test_every_run_has_a_folder_of_its_own(make_grid):
    grid = make_grid()
    runs = [run for row in ROWS for run in grid.seed_runs(row, 3e-3)] + grid.tuning_runs("moxe")
    assert len({run.folder for run in runs}) == len(runs) == len(ROWS) * 3 + len(grid.learning_rates)


def test_the_key_does_not_depend_on_what_does_not_decide_the_numbers(make_grid, tmp_path):
    same = folder(make_grid())
    assert folder(make_grid(seeds=5)) == same
    assert folder(make_grid(out=tmp_path / "elsewhere")) == same
    overrides = [("training.num_threads", "2"), ("data.source", "elsewhere.txt"), ("training.save_steps", "7")]
    assert folder(make_grid(overrides=overrides)) == same


@pytest.mark.parametrize(
    "change",
    [
        {"overrides": [("training.max_steps", "7")]},
        {"overrides": [("data.sequence_length", "64")]},
        {"data": dataclasses.replace(DATA, fingerprint="0" * 64)},
        {"data": dataclasses.replace(DATA, lambada=("another word",))},
        {"data": dataclasses.replace(DATA, lambada=None)},
        {"scale": "tiny"},
    ],
    ids=lambda change: str(next(iter(change))),
)
def test_the_key_depends_on_what_decides_the_numbers(make_grid, change):
    assert folder(make_grid(**change)) != folder(make_grid())


def test_the_key_depends_on_seed_learning_rate_and_row(make_grid):
    grid = make_grid()
    keys = {folder(grid)[-10:], folder(grid, seed=1)[-10:], folder(grid, rate=1e-3)[-10:], folder(grid, ROWS[5])[-10:]}
    assert len(keys) == 4


def test_a_setting_at_its_default_is_not_in_the_key_so_that_a_new_one_changes_no_key(make_grid):
    run = make_grid().example_of(MOXE)
    settings = dict(deciding_settings(run.recipe, DATA.vocab_size))
    assert settings["model.hidden_size"] == 128
    assert "model.gamma" not in settings  # 0.7, its default
    assert "training.seed" not in settings  # 0, its default


def test_every_row_has_the_same_data_order_and_windows_for_a_seed(make_grid):
    grid = make_grid()
    for row in ROWS:
        for seed, run in enumerate(grid.seed_runs(row, 3e-3)):
            assert run.recipe.training.seed == seed
            assert run.recipe.data == grid.example_of(MOXE).recipe.data
            same = dataclasses.replace(run.recipe.training, seed=0, name=None)
            assert same == dataclasses.replace(grid.example_of(MOXE).recipe.training, name=None, learning_rate=3e-3)


def test_a_learning_rate_is_chosen_by_the_lowest_validation_loss_once_all_candidates_are_done(make_grid, pretend):
    grid = make_grid()
    first, second, *others = grid.tuning_runs("moxe")
    assert {run.seed for run in (first, second, *others)} == {TUNING_SEED}
    pretend(first, 5.0)
    pretend(second, 4.0)
    assert grid.learning_rate("moxe") is None
    for other in others:
        pretend(other, 4.5)
    assert grid.learning_rate("moxe") == second.recipe.training.learning_rate
    assert grid.learning_rate("llama") is None  # each model chooses its own


def test_a_candidate_that_failed_or_diverged_is_not_chosen(make_grid, pretend):
    grid = make_grid()
    first, second, *others = grid.tuning_runs("moxe")
    pretend(first, float("nan"))
    pretend(second, 4.0)
    for other in others:
        other.folder.mkdir(parents=True)
        (other.folder / "error.txt").write_text("the gradient is not finite\n")
    assert grid.learning_rate("moxe") == second.recipe.training.learning_rate


def test_a_given_learning_rate_is_not_tuned(make_grid):
    grid = make_grid(overrides=[("training.learning_rate", "1e-3")])
    assert grid.tuning_runs("moxe") == []
    assert grid.learning_rate("moxe") == 1e-3
