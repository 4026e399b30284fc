"""What the pages link to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moxe.models.accounting import count_parameters
from moxe.recipe import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_of_a_page_leads_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_has_a_gap_to_fill(page: Path):
    assert not re.search(r"@[A-Z]+@|TODO|FIXME", page.read_text(encoding="utf-8"))


def test_the_sizes_of_the_models_that_are_compared_are_those_of_their_recipes():
    page = (ROOT / "docs" / "sizes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| ([\d,]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for name, total, active in rows:
        count = count_parameters(load_recipe(name).model_config())
        assert (total, active) == (f"{count.total_parameters:,}", f"{count.active_parameters:,}"), name
