"""The page on screens of three widths, light and dark, and with a text as long as it may be."""

from __future__ import annotations

import dataclasses
import io
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moxe.experiments import MOST_TOKENS
from moxe.experiments.exploration import explore
from moxe.models.configuration_moxe import MoxEConfig
from moxe.observability.estimates import Estimate
from moxe.observability.explorer.exploration import Exploration, LayerExploration
from moxe.observability.explorer.page import write_page
from moxe.observability.explorer.preferences import LIKINGS, Liking, Preferences
from moxe.observability.memory import ExpertMemory
from tests.browser import PHONE, TABLET, WIDE
from tests.models.tiny import tiny_model
from tests.observability.explorer.conftest import TEXT, Made, Open
from tests.sentences import SENTENCES

LEAST_CONTRAST = 4.5  # WCAG 2, level AA, of text of an ordinary size
# Of every element with a text of its own: its words, its colour, and the colours behind it, the nearest first.
COLOURS = """() => [...document.querySelectorAll("body *")].flatMap((one) => {
  const words = [...one.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE).map((node) => node.data.trim());
  if (!words.join("") || !one.checkVisibility() || one.disabled) return [];
  if (one.matches("script, style, title, option")) return [];
  const behind = [];
  for (let at = one; at !== null; at = at.parentElement) behind.push(getComputedStyle(at).backgroundColor);
  const style = getComputedStyle(one);
  return [[words.join(" "), one instanceof SVGElement ? style.fill : style.color, behind]];
})"""
CELLS = """() => [...document.querySelectorAll('[data-part="load"] text')]
  .filter((text) => /%$/.test(text.textContent))
  .map((text, index) => [
    text.textContent,
    getComputedStyle(text).fill,
    [getComputedStyle(document.querySelectorAll('g[aria-label="cell"] rect')[index]).fill],
  ])"""


def colour(text: str) -> np.ndarray:
    """Red, green, blue and opacity, 0 to 1, of a computed colour."""
    numbers = [float(part) for part in re.findall(r"(?<![a-z])-?\d*\.?\d+(?:e-?\d+)?", text.removeprefix("color(srgb"))]
    scale = 1.0 if text.startswith("color(srgb") else 255.0
    assert text.startswith(("color(srgb", "rgb")), text
    return np.array([*(number / scale for number in numbers[:3]), *(numbers[3:] or [1.0])])


def contrast(front: str, behind: list[str]) -> float:
    """Of WCAG 2: (lighter + 0.05) / (darker + 0.05), in relative luminance."""
    surface = np.ones(3)
    for layer in map(colour, reversed(behind)):
        surface = layer[3] * layer[:3] + (1 - layer[3]) * surface
    ink = colour(front)
    of_both = [luminance(ink[3] * ink[:3] + (1 - ink[3]) * surface), luminance(surface)]
    return (max(of_both) + 0.05) / (min(of_both) + 0.05)


def luminance(rgb: np.ndarray) -> float:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_contrast_is_that_of_the_standard():
    assert contrast("rgb(0, 0, 0)", ["rgba(0, 0, 0, 0)", "rgb(255, 255, 255)"]) == pytest.approx(21)
    assert contrast("rgb(118, 118, 118)", ["color(srgb 1 1 1 / 1)"]) == pytest.approx(4.54, abs=0.005)
    assert contrast("rgb(0, 0, 0)", ["color(srgb 1 1 1 / 0.5)", "rgb(0, 0, 0)"]) == pytest.approx(5.28, abs=0.02)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_on_what_is_behind_it(visiting: Open, made: Made, scheme: str):
    with visiting(made.path, color_scheme=scheme) as visited:
        page = visited.page
        page.locator("[data-token]").nth(4).focus()
        found = {}
        for measure in ("difficulty", "group_m"):
            page.locator("#measure").select_option(measure)
            page.locator("#layer").select_option("1")
            shades = set(page.locator("[data-token]").evaluate_all("all => all.map(one => one.className)"))
            assert shades <= {f"s{shade}" for shade in range(7)}
            # Every shade, whatever the values of this text are.
            page.locator("[data-token]").evaluate_all("all => all.forEach((one, i) => { one.className = `s${i % 7}` })")
            for words, front, behind in [*page.evaluate(COLOURS), *page.evaluate(CELLS)]:
                found[measure, words, front, tuple(behind)] = contrast(front, behind)
        assert len(found) > 100
        too_faint = {key[:3]: round(value, 2) for key, value in found.items() if value < LEAST_CONTRAST}
        assert too_faint == {}


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_dark_is_dark_and_light_is_light_also_when_it_changes(visiting: Open, made: Made, scheme: str, is_dark: bool):
    background = "getComputedStyle(document.body).backgroundColor"
    with visiting(made.path, color_scheme=scheme) as visited:
        before = visited.page.locator('[data-part="load"]').inner_html()
        assert (luminance(colour(visited.page.evaluate(background))[:3]) < 0.05) is is_dark
        visited.page.emulate_media(color_scheme="light" if is_dark else "dark")
        assert (luminance(colour(visited.page.evaluate(background))[:3]) < 0.05) is not is_dark
        assert visited.page.locator('[data-part="load"]').inner_html() != before  # drawn anew in the other colours


@pytest.fixture(scope="module")
def pages(made: Made, made_pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages that may be too wide: of one model, of two, and with names that nothing breaks."""
    long = tmp_path_factory.mktemp("long") / "page.html"
    unbroken = dataclasses.replace(
        made.exploration, name="x" * 300, corpus_name="y" * 300, pieces=["w" * 300] * len(made.exploration.pieces)
    )
    write_page([unbroken, made_pair[0][1]], long, text_name="z" * 300)
    return {"one": made.path, "pair": made_pair[1], "long": long}


@pytest.mark.parametrize("size", [WIDE, TABLET, PHONE])
@pytest.mark.parametrize("which", ["one", "pair", "long"])
def test_the_page_never_scrolls_sideways(visiting: Open, pages: dict[str, Path], which: str, size: tuple[int, int]):
    with visiting(pages[which], size) as visited:
        page = visited.page
        page.locator("[data-token]").nth(3).click()
        page.locator(".card button").first.click()
        assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [size[0], size[0]]


@pytest.mark.parametrize(("size", "is_beside"), [(WIDE, True), (TABLET, False), (PHONE, False)])
def test_two_models_stand_side_by_side_where_there_is_room(
    visiting: Open, made_pair, size: tuple[int, int], is_beside: bool
):
    with visiting(made_pair[1], size) as visited:
        first, second = (view.bounding_box() for view in visited.page.locator("section.model").all())
        if is_beside:
            assert first["y"] == second["y"]
            assert first["x"] + first["width"] <= second["x"]
            assert first["width"] == pytest.approx(second["width"], abs=1)
        else:
            assert first["y"] + first["height"] <= second["y"]
            assert first["x"] == second["x"]
            assert first["width"] > 0.9 * size[0]


@pytest.mark.parametrize("size", [WIDE, TABLET, PHONE])
def test_the_chosen_token_and_its_details_are_seen_together(visiting: Open, made: Made, size: tuple[int, int]):
    with visiting(made.path, size) as visited:
        page = visited.page
        for index in (0, 120, len(made.exploration.pieces) - 1):
            token, details = page.locator(f'[data-token="{index}"]'), page.locator('[data-part="token"]')
            token.focus()
            box = token.bounding_box()
            middle = [box["x"] + min(box["width"], 8) / 2, box["y"] + min(box["height"], 12) / 2]
            assert page.evaluate("place => document.elementFromPoint(...place)?.dataset.token", middle) == str(index)
            heading = details.locator("h3").bounding_box()
            assert 0 <= heading["y"] <= size[1] - heading["height"]


def imagined(tokens: int, layers: int, experts: int, k: int) -> Exploration:
    """A model that never was, with as much to show as a trained one."""
    generator = np.random.default_rng(0)
    words = " ".join(SENTENCES).split()
    vocabulary = {token: f" {word}{token}" for token, word in zip(range(3000), words * 100, strict=False)}
    token_ids = generator.integers(0, len(vocabulary), tokens)

    def layer() -> LayerExploration:
        weights = np.sort(generator.dirichlet(np.ones(k), tokens))[:, ::-1]
        return LayerExploration(
            difficulty=generator.random(tokens),
            entropy=generator.random(tokens),
            log_odds=generator.normal(0, 2, tokens),
            experts=np.argsort(generator.random((tokens, experts)))[:, :k],
            weights=weights,
            load=generator.dirichlet(np.ones(experts)),
            difficulty_variance=0.08333,
            is_collapsed=False,
            odds_slope=Estimate(4.0, 3.5, 4.5),
            preferences=[Preferences(0.1, [Liking(token, 90, 100) for token in range(LIKINGS)])] * experts,
            memory=[ExpertMemory(tokens // experts, 0.9, [1.0, 20.0, None], tokens - 10) for _ in range(experts)],
        )

    return Exploration(
        name="imagined",
        config=MoxEConfig(num_hidden_layers=layers, num_experts=experts, num_experts_per_tok=k),
        pieces=[vocabulary[token] for token in token_ids.tolist()],
        token_ids=token_ids,
        losses=generator.exponential(4, tokens),
        next_ids=generator.integers(0, len(vocabulary), (tokens, 5)),
        next_probabilities=np.sort(generator.random((tokens, 5)) / 5)[:, ::-1],
        rarity=generator.exponential(8, tokens),
        corpus_name="a corpus",
        corpus_tokens=1_000_000,
        routed_tokens=20_000,
        layers=[layer() for _ in range(layers)],
        vocabulary=vocabulary,
    )


def test_a_page_of_2000_tokens_and_a_large_model_is_small_enough_to_send(tmp_path: Path):
    write_page([imagined(2000, layers=16, experts=16, k=2)], tmp_path / "page.html", text_name="a text")
    assert (tmp_path / "page.html").stat().st_size < 5e6


def test_the_longest_text_opens_and_answers_within_seconds(visiting: Open, tmp_path: Path):
    write_page([imagined(MOST_TOKENS, layers=3, experts=8, k=2)], tmp_path / "page.html", text_name="a text")
    begin = time.monotonic()
    with visiting(tmp_path / "page.html") as visited:
        page = visited.page
        assert page.locator("[data-token]").count() == MOST_TOKENS
        assert time.monotonic() - begin < 20  # on a machine that does much else; seen: 3 to 5
        page.locator('[data-token="0"]').focus()
        assert seconds_of(page, lambda: page.keyboard.press("ArrowRight")) < 2
        assert seconds_of(page, lambda: page.keyboard.press("ArrowDown")) < 2
        assert seconds_of(page, lambda: page.locator("#measure").select_option("loss")) < 5
        assert seconds_of(page, lambda: page.get_by_role("button", name="layer 1, expert S5").click()) < 5


def seconds_of(page: Any, act: Any) -> float:
    """Until what the act changes has been drawn."""
    begin = time.monotonic()
    act()
    page.evaluate("new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)))")
    return time.monotonic() - begin


def test_two_models_share_the_axes_of_memory_and_theory(visiting: Open, explored, tokenizer, tmp_path: Path):
    other = explore(tiny_model(seed=1, vocab_size=300, num_hidden_layers=3), TEXT * 3, tokenizer, name="other")
    write_page([explored("one")[1], other], tmp_path / "page.html", text_name="a text")
    ticks = """all => all.map(one => [...one.querySelectorAll("g[aria-label$='tick label'] text")]
      .map(text => [text.textContent, text.getAttribute("transform")])
      .filter(([label]) => !/^[MS]/.test(label)))"""
    with visiting(tmp_path / "page.html") as visited:
        for charts in ('[data-part="memory"] svg', '[data-part="theory"] svg[role="img"]'):
            first, second = (
                view.locator(charts).evaluate_all(ticks) for view in visited.page.locator("section.model").all()
            )
            assert first == second
            assert len(first) > 0
            assert all(len(of_chart) > 3 for of_chart in first)


def test_shades_stay_where_a_persons_own_colours_replace_all_others(visiting: Open, made: Made):
    with visiting(made.path, forced_colors="active") as visited:
        pictures = [shade.screenshot() for shade in visited.page.locator(".key li").all()]
    corners = {Image.open(io.BytesIO(picture)).convert("RGB").getpixel((4, 4)) for picture in pictures}
    assert len(corners) == len(pictures) == 7
