"""What a reader sees in a browser, against the model called once over the whole text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from moxe.observability.memory import memory_of_experts, record_memory
from tests.observability.explorer.conftest import CORPUS, TEXT, Made, Open

STORED = 0.5e-5  # numbers are rounded to five decimals before the page rounds them for its reader
GAMMA = 0.7


@dataclass(frozen=True)
class Whole:
    """The model's output, the start token before the text left out: N tokens, L layers, E experts, K a token."""

    token_ids: list[int]
    losses: np.ndarray  # [N]
    next_probabilities: np.ndarray  # [N, vocabulary]
    difficulty: np.ndarray  # [L, N]
    entropy: np.ndarray  # [L, N]
    odds: np.ndarray  # [L, N] P_M / P_S
    experts: np.ndarray  # [L, N, K]
    weights: np.ndarray  # [L, N, K]
    rarity: np.ndarray  # [N]
    memory: list[list[Any]]

    @property
    def group_m_weight(self) -> np.ndarray:  # [L, N]
        return np.where(self.experts < 2, self.weights, 0).sum(-1)


@pytest.fixture(scope="module")
def whole(made: Made) -> Whole:
    token_ids = made.tokenizer.encode(TEXT, add_special_tokens=False)
    input_ids = torch.tensor([[made.tokenizer.bos_token_id, *token_ids]])
    with torch.no_grad(), record_memory(made.model) as recording:
        output = made.model(input_ids, output_router_logits=True)
    log_probabilities = output.logits[0].log_softmax(-1)
    logits = torch.stack([layer.logits[0, 1:] for layer in output.routing])
    raw = torch.stack([layer.unbiased_logits[0, 1:] for layer in output.routing]).softmax(-1)
    probabilities = logits.softmax(-1)
    in_corpus = Counter(token for document in CORPUS for token in made.tokenizer.encode(document))
    # A token that the corpus does not hold is as rare as one that occurs once in it.
    rarity = [-math.log(max(in_corpus[token], 1) / in_corpus.total()) for token in token_ids]
    return Whole(
        token_ids=token_ids,
        losses=-log_probabilities[range(len(token_ids)), token_ids].numpy(),
        next_probabilities=log_probabilities[1:].exp().numpy(),
        difficulty=torch.stack([layer.difficulty[0, 1:] for layer in output.routing]).numpy(),
        entropy=(-(raw * raw.log()).sum(-1) / math.log(4)).numpy(),
        odds=(probabilities[..., :2].sum(-1) / probabilities[..., 2:].sum(-1)).numpy(),
        experts=torch.stack([layer.expert_indices[0, 1:] for layer in output.routing]).numpy(),
        weights=torch.stack([layer.expert_weights[0, 1:] for layer in output.routing]).numpy(),
        rarity=np.array(rarity),
        memory=memory_of_experts(recording, [layer.expert_indices[0] for layer in output.routing]),
    )


@pytest.fixture(scope="module")
def page(visiting: Open, made: Made) -> Iterator[Any]:
    """The page, open for all tests of this file: what one shows, the next may change."""
    with visiting(made.path) as visited:
        yield visited.page


def rows(table: Any) -> list[list[str]]:
    """The cells of a table's body as a reader sees them."""
    return table.evaluate("table => [...table.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.innerText))")


def first_number(text: str) -> tuple[float, float]:
    """The first number of a text, a percentage as a part of one, and half of its last digit."""
    match = re.search(r"(-?[\d,]+(?:\.(\d+))?(?:e[+-]?\d+)?)(%?)", text)
    assert match is not None, text
    unit = 0.01 if match[3] else 1.0
    return float(match[1].replace(",", "")) * unit, 0.5 * unit * 10.0 ** -len(match[2] or "")


def number(text: str) -> float:
    return first_number(text)[0]


def shown(text: str) -> Any:
    """The number of a text, to be compared with one that was not rounded as the page rounds."""
    value, half_a_digit = first_number(text)
    return pytest.approx(value, abs=half_a_digit + STORED)


def shown_exponential(text: str) -> Any:
    """The same for an exponential of a number that was rounded."""
    return pytest.approx(number(text), abs=0.005 + STORED, rel=1.1 * STORED)


def readable(piece: str) -> str:
    return piece.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") if piece else "·"


def test_the_text_that_is_shown_is_the_text(page: Any, made: Made):
    shown_pieces = page.locator("[data-token]").all_text_contents()
    assert len(shown_pieces) == len(made.exploration.pieces)
    assert "·" not in TEXT
    assert "↵" not in TEXT
    assert "".join(shown_pieces).replace("·", "").replace("↵\n", "\n") == TEXT


@pytest.mark.parametrize("index", [0, 17, 60, 100, -2, -1])
def test_the_details_of_a_token_are_those_of_the_model(page: Any, made: Made, whole: Whole, index: int):
    index %= len(whole.token_ids)
    page.locator(f'[data-token="{index}"]').focus()
    details = page.locator('[data-part="token"]')
    pieces = made.exploration.pieces
    assert details.locator("h3").inner_text().split() == [
        "Token", *readable(pieces[index]).split(), f"{index + 1}", "of", f"{len(pieces)}"
    ]  # fmt: skip
    token_id, loss, rarity = details.locator("dd").all_inner_texts()
    assert number(token_id) == whole.token_ids[index]
    assert whole.losses[index] == shown(loss)
    assert math.exp(-whole.losses[index]) == shown(loss.split("probability")[1])
    assert whole.rarity[index] == shown(rarity)
    decisions, expectations = (rows(table) for table in details.locator("table").all())
    assert len(decisions) == 3
    for layer, (name, d, odds, odds_of_bias, experts) in enumerate(decisions):
        assert name == str(layer)
        assert whole.difficulty[layer, index] == shown(d)
        assert whole.odds[layer, index] == shown_exponential(odds)
        assert math.exp(2 * GAMMA * whole.difficulty[layer, index]) == shown_exponential(odds_of_bias)
        expected = sorted(
            zip(whole.weights[layer, index], whole.experts[layer, index], strict=True), key=lambda pair: -pair[0]
        )
        found = re.findall(r"([MS])(\d+)\s([\d.]+%)", experts)
        assert [(group, int(expert)) for group, expert, _ in found] == [("MMSS"[e], e) for _, e in expected]
        assert [weight for weight, _ in expected] == [shown(weight) for *_, weight in found]
    likeliest = np.argsort(-whole.next_probabilities[index])[:5]
    assert [text.split(" ←")[0].strip() for text, _ in expectations] == [
        readable(made.exploration.vocabulary[token]).strip() for token in likeliest
    ]
    assert [whole.next_probabilities[index, token] for token in likeliest] == [shown(part) for _, part in expectations]
    follows = details.locator("p").last.inner_text()
    if index + 1 == len(pieces):
        assert follows == "Here the text ends."
    else:
        assert follows.startswith(f"What follows is {readable(pieces[index + 1])}, at a loss of ")
        assert whole.losses[index + 1] == shown(follows.split("at a loss of")[1].removesuffix("nats."))
        marks = ["←" in text for text, _ in expectations]
        assert marks == [token == whole.token_ids[index + 1] for token in likeliest]


@pytest.mark.parametrize(
    ("measure", "values"),
    [
        ("difficulty", lambda whole: whole.difficulty),
        ("loss", lambda whole: whole.losses),
        ("next_loss", lambda whole: whole.losses[1:]),
        ("entropy", lambda whole: whole.entropy),
        ("group_m", lambda whole: whole.group_m_weight),
        ("rarity", lambda whole: whole.rarity),
    ],
)
def test_every_measure_shades_and_names_every_token_by_its_value(
    page: Any, whole: Whole, measure: str, values: Callable[[Whole], np.ndarray]
):
    page.locator("#measure").select_option(measure)
    expected = values(whole)
    layers = page.locator("#layer")
    assert layers.is_disabled() is (expected.ndim == 1)
    words = page.locator("#measure").evaluate("select => select.selectedOptions[0].text")
    titles = set()
    for layer in ["mean", "0", "1", "2"] if expected.ndim == 2 else [None]:
        if layer is None:
            of_layer = expected
        else:
            layers.select_option(layer)
            of_layer = expected.mean(0) if layer == "mean" else expected[int(layer)]
        labels, classes = page.locator("[data-token]").evaluate_all(
            "all => [all.map(one => one.ariaLabel), all.map(one => one.className)]"
        )
        if measure == "next_loss":  # behind the last token there is none
            assert labels.pop().endswith(" none")
            assert classes.pop() == "s0"
        told = [number(label.rpartition(f", {words} ")[2]) for label in labels]
        np.testing.assert_allclose(told, of_layer, atol=0.005 + STORED, rtol=0)
        shades = [int(name.removeprefix("s")) for name in classes]
        bounds = [number(text) for text in page.locator('[data-part="key"] li').all_inner_texts()]
        assert len(bounds) == 7
        limits = [-math.inf, *bounds[1:], math.inf]  # the first names the bound below which it holds
        assert {0, 6} <= set(shades)
        for value, shade in zip(of_layer, shades, strict=True):
            assert limits[shade] - 0.005 - 2 * STORED <= value <= limits[shade + 1] + 0.005 + 2 * STORED
        titles.add(page.locator('[data-part="key-title"]').inner_text())
    assert len(titles) == (4 if expected.ndim == 2 else 1)
    assert all(words in title for title in titles)


def test_the_load_is_the_share_of_the_assignments(page: Any, whole: Whole):
    cells = page.get_by_role("button", name=re.compile(r"^layer \d, expert"))
    assert cells.count() == 3 * 4
    labels = iter(cells.evaluate_all("all => all.map(one => one.getAttribute('aria-label'))"))
    written = iter(page.locator('[data-part="load"] text').filter(has_text=re.compile(r"^\d+%$")).all_text_contents())
    for layer in range(3):
        load = np.bincount(whole.experts[layer].ravel(), minlength=4) / whole.experts[layer].size
        for expert in range(4):
            label = next(labels)
            assert label.startswith(f"layer {layer}, expert {'MMSS'[expert]}{expert}: ")
            share, times = label.split(": ")[1].split(" of the assignments, ")
            assert load[expert] == shown(share)
            assert load[expert] * 4 == pytest.approx(number(times), abs=0.005 + 4 * STORED)
            assert load[expert] == shown(next(written))


def test_the_cards_of_experts_tell_load_and_memory(page: Any, whole: Whole):
    for layer in range(3):
        page.locator('[data-part="experts-layer"]').select_option(str(layer))
        load = np.bincount(whole.experts[layer].ravel(), minlength=4) / whole.experts[layer].size
        cards = page.locator(".card")
        assert cards.count() == 4
        for expert, memory in enumerate(whole.memory[layer]):
            card = cards.nth(expert)
            assert (
                card.locator("h4").inner_text() == f"{'MMSS'[expert]}{expert}, layer {layer} ({'ms'[expert > 1]}LSTM)"
            )
            assert load[expert] == shown(card.get_by_text("of the assignments").inner_text())
            words = card.locator('[data-part="memory"]').inner_text()
            tokens, gate, low, high = (
                re.search(pattern, words)
                for pattern in (r"is ([\d,]+) tokens? long", r"forget gate ([\d.]+)\.", r"80%: (.+) to", r" to (.+)\)")
            )
            assert tokens is not None
            assert gate is not None
            assert low is not None
            assert high is not None
            assert memory.tokens == number(tokens[1])
            assert memory.mean_forget_gate == shown(gate[1])
            median = "0"
            if memory.reach_quantiles[1] != 0:
                median = words.split("what was written ")[1].split(" text tokens back")[0]
            assert [low[1], median, high[1]] == [
                f"more than {memory.reach_bound:,}" if reach is None else f"{reach:,.0f}"
                for reach in memory.reach_quantiles
            ]


def test_the_cards_of_experts_tell_what_each_likes_as_plain_counts_do(page: Any, made: Made):
    documents = [made.tokenizer.encode(document) for document in CORPUS]  # each shorter than a passage
    token_ids = np.concatenate(documents)
    start, liked = made.tokenizer.bos_token_id, 0
    with torch.no_grad():
        outputs = [made.model(torch.tensor([[start, *ids]]), output_router_logits=True) for ids in documents]
    for layer in range(3):
        experts = np.concatenate([output.routing[layer].expert_indices[0, 1:] for output in outputs])
        page.locator('[data-part="experts-layer"]').select_option(str(layer))
        for expert in range(4):
            card = page.locator(".card").nth(expert)
            received = (experts == expert).any(1)
            assert received.mean() == shown(re.search(r"receives ([\d.]+%) of all tokens", card.inner_text())[1])
            table = rows(card.locator("table")) if card.locator("table").count() else []
            for name, counts, part in table:
                chosen, occurrences = map(number, counts.split(" of "))
                assert (chosen, occurrences) in {
                    (int((received & (token_ids == token)).sum()), int((token_ids == token).sum()))
                    for token, text in made.exploration.vocabulary.items()
                    if readable(text) == name
                }
                assert chosen / occurrences == shown(part)
                assert chosen / occurrences > received.mean()
                liked += 1
    assert liked > 0


def test_the_slopes_and_moments_are_those_of_plain_least_squares(page: Any, whole: Whole):
    table = rows(page.locator('[data-part="theory-table"] table'))
    assert len(table) == 3
    for layer, (name, slope, theory, mean, variance, _) in enumerate(table):
        assert name == f"layer {layer}"
        assert np.polyfit(whole.difficulty[layer], np.log(whole.odds[layer]), 1)[0] == shown(slope)
        assert number(theory) == pytest.approx(2 * GAMMA)
        assert whole.difficulty[layer].mean() == shown(mean)
        assert whole.difficulty[layer].var() == pytest.approx(float(variance), rel=0.05)
    for layer in range(3):
        assert page.locator(f'figure[data-layer="{layer}"] svg[role=img]').count() == 2


def test_the_summary_above_the_text_is_of_this_model(page: Any, whole: Whole):
    text, loss, layers, experts, gamma = page.locator('[data-part="facts"] dd').all_inner_texts()
    assert text == f"a text, {len(whole.token_ids)} tokens"
    assert whole.losses.mean() == shown(loss)
    assert [layers, experts, float(gamma)] == ["3", "4 a layer, 2 a token", GAMMA]
