"""The rows are the paper's, and each is a model that exists."""

from __future__ import annotations

import pytest
import torch

from moxe.experiments import SCALES, TABLES
from moxe.experiments.scales import load_scale
from moxe.experiments.tables import REFERENCE, ROWS, rows_of
from moxe.models.architectures import build_model


def size(scale, row) -> int:
    recipe = scale.recipe({**scale.models[row.model], **row.settings}, {}, [])
    with torch.device("meta"):
        model = build_model(recipe.model_config(scale.data.get("vocab_size", 49152)))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SCALES)
def test_the_models_of_table_1_are_of_one_size_within_three_percent(name):
    scale = load_scale(name)
    sizes = {row.name: size(scale, row) for row in rows_of("table1")}
    for row in rows_of("table1"):
        target = row.parameters if name == "paper" and row.parameters else sizes[REFERENCE]
        assert abs(sizes[row.name] / target - 1) <= 0.03, sizes


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_a_model_at_every_scale(row):
    assert all(size(load_scale(name), row) > 0 for name in SCALES)


@pytest.mark.parametrize("table", TABLES)
def test_every_table_shows_the_model_that_the_others_are_compared_with(table):
    assert rows_of(table)[0].name == REFERENCE


def test_the_papers_changes_follow_from_its_perplexities():
    full = rows_of("table1")[0].lambada_perplexity
    reported = [row for row in ROWS if row.change_percent is not None]
    assert len(reported) == 5
    for row in reported:
        assert row.change_percent == pytest.approx(100 * (row.lambada_perplexity / full - 1), abs=0.5)


def test_rows_differ_in_what_they_are():
    kinds = [(row.model, tuple(sorted(row.settings.items()))) for row in ROWS]
    assert len(set(kinds)) == len(kinds)
    assert len({row.name for row in ROWS}) == len(ROWS)
