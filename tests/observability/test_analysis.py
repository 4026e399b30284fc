"""What is planted in synthetic routing is found, with an interval that covers it, and nothing is found in nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moxe.errors import UserError
from moxe.models.configuration_moxe import MoxEConfig
from moxe.modules.router import RouterOutput
from moxe.observability.analysis import MINIMUM_TOKENS, LayerAnalysis, RoutingAnalysis, analyse_tokens
from moxe.observability.analysis_plots import draw_analysis
from moxe.observability.estimates import Estimate
from moxe.observability.reading import tables

N, EXPERTS, CHOSEN, GAMMA, WORDS = 6000, 4, 2, 0.7, 400


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def words(generator: torch.Generator) -> Tensor:
    """[N] token ids, the frequency of which falls as in a language."""
    return torch.multinomial(1 / torch.arange(2.0, WORDS + 2), N, replacement=True, generator=generator)


def route(raw: Tensor, difficulty: Tensor | None, gamma: float = GAMMA) -> RouterOutput:
    """What a router with the standard bias decides for raw logits [N, E]."""
    sign = torch.tensor([1.0] * (EXPERTS // 2) + [-1.0] * (EXPERTS // 2), dtype=raw.dtype)
    logits = raw if difficulty is None else raw + gamma * difficulty[:, None] * sign
    top = logits.softmax(-1).topk(CHOSEN, dim=-1)
    return RouterOutput(logits, raw, difficulty, top.indices, top.values / top.values.sum(-1, keepdim=True))


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def analyse(routing: RouterOutput, ids: Tensor, losses: Tensor | None = None, **settings: Any) -> RoutingAnalysis:
    config = MoxEConfig(num_experts=EXPERTS, num_experts_per_tok=CHOSEN, **{"gamma": GAMMA, **settings})
    losses = torch.linspace(1, 2, len(ids)).double() if losses is None else losses
    return analyse_tokens(
        [routing],
        losses,
        ids,
        torch.arange(len(ids)) // 1000,
        config=config,
        context_length=None,
        token_counts=None,
        seed=0,
    )


def layer_of(analysis: RoutingAnalysis) -> LayerAnalysis:
    return analysis.layers[0]


def difficulty_of(analysis: RoutingAnalysis):
    assert analysis.layers[0].difficulty is not None
    return analysis.layers[0].difficulty


def planted(generator: torch.Generator, lean: float) -> RoutingAnalysis:
    """Raw logits whose log-odds follow d with slope `lean`."""
    difficulty = torch.rand(N, generator=generator, dtype=torch.float64)
    raw = 0.3 * noise(generator, N, EXPERTS)
    raw[:, : EXPERTS // 2] += lean * difficulty[:, None]
    return analyse(route(raw, difficulty), words(generator))


@pytest.mark.parametrize(
    ("lean", "sentence"),
    [(0.0, "which agrees with 2γ = 1.4"), (2.5, "the raw logits lean too"), (-2.5, "lean against it")],
)
def test_a_planted_slope_is_recovered_within_a_narrow_interval(generator, lean: float, sentence: str):
    analysis = planted(generator, lean)
    difficulty = difficulty_of(analysis)
    odds, raw = difficulty.odds_slope, difficulty.raw_odds_slope
    assert odds is not None
    assert raw is not None
    assert odds.covers(2 * GAMMA + lean)
    assert raw.covers(lean)
    assert odds.low is not None
    assert odds.high is not None
    assert 0 < odds.high - odds.low < 0.2
    assert sentence in tables(analysis)[0].readings[0]


def test_with_the_standard_bias_the_slopes_differ_by_exactly_two_gamma(generator):
    difficulty = difficulty_of(planted(generator, 1.3))
    odds, raw = difficulty.odds_slope, difficulty.raw_odds_slope
    assert odds is not None
    assert raw is not None
    for name in ("value", "low", "high"):
        assert getattr(odds, name) == pytest.approx(getattr(raw, name) + 2 * GAMMA, rel=1e-12)


def test_the_part_of_the_bias_that_the_raw_logits_take_back_is_found(generator):
    difficulty = torch.rand(N, generator=generator, dtype=torch.float64)
    raw = torch.zeros(N, EXPERTS, dtype=torch.float64)
    raw[:, : EXPERTS // 2] -= 0.8 * 2 * GAMMA * 0.5  # of a mean bias of 2 gamma / 2
    cancelled = difficulty_of(analyse(route(raw, difficulty), words(generator))).cancelled_bias
    assert cancelled is not None
    assert cancelled.value == pytest.approx(0.8 * 0.5 / float(difficulty.mean()), rel=1e-9)
    assert cancelled.covers(0.8)


def test_without_bias_there_is_no_share_of_it(generator):
    difficulty = torch.rand(N, generator=generator, dtype=torch.float64)
    routing = route(noise(generator, N, EXPERTS), difficulty, gamma=0)
    assert difficulty_of(analyse(routing, words(generator), gamma=0.0)).cancelled_bias is None


def test_the_slope_of_the_choice_is_found(generator):
    found = []
    for _ in range(20):
        difficulty = torch.rand(N, generator=generator, dtype=torch.float64)
        routing = route(noise(generator, N, EXPERTS), difficulty)
        to_m = torch.rand(N, CHOSEN, generator=generator) < torch.sigmoid(4 * difficulty - 2)[:, None]
        group = torch.where(to_m, 0, EXPERTS // 2)
        routing = dataclasses.replace(routing, expert_indices=group + torch.arange(CHOSEN))
        slope = difficulty_of(analyse(routing, words(generator))).assignment_slope
        assert slope is not None
        found.append(slope)
    assert np.mean([slope.value for slope in found]) == pytest.approx(4, abs=0.06)  # of one: a deviation of 0.075
    assert sum(slope.covers(4) for slope in found) >= 16


@pytest.mark.parametrize(("deviation", "collapsed"), [(0.0, True), (0.005, True), (0.02, False)])
def test_a_collapsed_difficulty_is_seen_and_said(generator, deviation: float, collapsed: bool):
    difficulty = 0.5 + deviation * noise(generator, N)
    analysis = analyse(route(noise(generator, N, EXPERTS), difficulty), words(generator))
    assert difficulty_of(analysis).collapsed is collapsed
    said = [("the difficulty has collapsed" in table.readings[0]) for table in tables(analysis)[:3]]
    assert said == [collapsed] * 3
    json.dumps(analysis.to_dict(), allow_nan=False)


def test_what_the_difficulty_goes_with_is_found_and_what_it_does_not_go_with_is_not(generator):
    ids = words(generator)
    difficulty = torch.rand(N, generator=generator, dtype=torch.float64)
    raw = noise(generator, N, EXPERTS) * (2 - difficulty)[:, None] * 2  # flatter where it is difficult
    losses = 3 - difficulty + 0.3 * noise(generator, N)
    found = difficulty_of(analyse(route(raw, difficulty), ids, losses))
    assert found.with_entropy is not None
    assert found.with_entropy.is_above_zero
    assert found.with_loss is not None
    assert found.with_loss.is_below_zero
    assert found.with_rarity is not None
    assert found.with_rarity.covers(0)
    assert found.identity_share == pytest.approx(0, abs=0.03)
    by_identity = torch.rand(WORDS, generator=generator, dtype=torch.float64)[ids]
    assert difficulty_of(analyse(route(raw, by_identity), ids)).identity_share == pytest.approx(1)


@pytest.mark.parametrize(("effect", "verdict"), [(1.5, "yes"), (-1.5, "reverse"), (0.0, "not seen")])
def test_a_planted_effect_of_rarity_is_found_and_none_is_reported_as_none(generator, effect: float, verdict: str):
    ids = words(generator)
    raw = noise(generator, N, EXPERTS)
    raw[:, : EXPERTS // 2] += effect * (ids.double().add(2).log() - 4)[:, None]  # the id is the rank of the frequency
    analysis = analyse(route(raw, None), ids)
    layer = layer_of(analysis)
    assert layer.rare_to_m == verdict
    first, last = layer.bands[0].mlstm_share, layer.bands[-1].mlstm_share
    assert (last.value - first.value) * effect > 0.3 * abs(effect) or effect == 0
    assert sum(band.tokens for band in layer.bands) == N
    assert layer.share_slope is not None
    assert layer.share_slope.covers(0) is (effect == 0)


def test_words_that_go_where_they_like_are_no_effect_of_rarity(generator):
    """A few frequent words with a home each correlate with anything; resampling the words shows it."""
    ids = words(generator)
    homes = 3 * noise(generator, WORDS, EXPERTS)
    verdicts = []
    for shift in range(10):
        raw = homes[(ids + 40 * shift) % WORDS] + 0.1 * noise(generator, N, EXPERTS)
        verdicts.append(layer_of(analyse(route(raw, None), ids)).rare_to_m)
    assert verdicts.count("not seen") >= 8


def test_experts_of_one_kind_give_no_verdict_about_mlstm_experts(generator):
    analysis = analyse(route(noise(generator, N, EXPERTS), None), words(generator), expert_kind="ffn")
    assert layer_of(analysis).rare_to_m is None
    assert "all experts are ffn" in tables(analysis)[3].readings[0]


def test_a_router_without_difficulty_leaves_out_what_cannot_be_said(generator):
    analysis = analyse(route(noise(generator, N, EXPERTS), None), words(generator), router_kind="standard")
    assert layer_of(analysis).difficulty is None
    for table in tables(analysis)[:3]:
        assert set(table.rows[0][1:]) == {"-"}
        assert len(table.rows[0]) == len(table.header)
        assert "has no difficulty" in table.readings[0]


@pytest.mark.parametrize("bias_kind", ["proportional", "masked"])
def test_the_slope_of_a_bias_with_a_threshold_is_said_to_be_that_above_it(generator, bias_kind: str):
    difficulty = torch.rand(N, generator=generator, dtype=torch.float64)
    analysis = analyse(route(noise(generator, N, EXPERTS), difficulty), words(generator), bias_kind=bias_kind)
    table = tables(analysis)[0]
    assert "above d = 0.5" in table.title
    assert "a slope only above d = 0.5" in table.readings[0]


def test_what_is_written_is_small_plain_json_with_five_digits(generator):
    analysis = planted(generator, 1.0)
    written = json.dumps(analysis.to_dict(), allow_nan=False)
    assert len(written) < 4000
    kept = json.loads(written)
    assert kept == analysis.to_dict()
    odds = difficulty_of(analysis).odds_slope
    assert isinstance(odds, Estimate)
    assert kept["layers"][0]["difficulty"]["odds_slope"]["value"] == pytest.approx(odds.value, rel=1e-4)
    assert kept["tokens"] == N
    assert kept["documents"] == 6
    assert kept["blocks"] == 6 * 4  # 1,000 tokens each: three blocks of 256 and a rest


def test_the_training_corpus_can_say_how_rare_a_token_is(generator):
    ids = words(generator)
    routing = route(noise(generator, N, EXPERTS), None)
    config = MoxEConfig(num_experts=EXPERTS, num_experts_per_tok=CHOSEN)
    counts = {token: 2**token for token in range(1, 30)}  # 0 and the rarer ones do not occur
    analysis = analyse_tokens(
        [routing], torch.ones(N), ids, torch.zeros(N), config=config, context_length=None, token_counts=counts, seed=0
    )
    total = sum(counts.values())
    expected = np.mean([math.log(total / counts.get(token, 1)) for token in ids.tolist()])
    bands = layer_of(analysis).bands
    assert sum(band.rarity * band.tokens for band in bands) / N == pytest.approx(expected, rel=1e-10)
    assert analysis.rarity_from == "training corpus"
    assert "rarity from the training corpus" in tables(analysis)[3].title


def test_too_few_tokens_and_a_model_that_has_diverged_are_refused(generator):
    ids = words(generator)
    routing = route(noise(generator, N, EXPERTS), None)
    with pytest.raises(UserError, match=f"gives {MINIMUM_TOKENS - 1} tokens to analyse, but at least {MINIMUM_TOKENS}"):
        analyse(routing, ids[: MINIMUM_TOKENS - 1])
    routing.logits[5, 1] = math.nan
    with pytest.raises(UserError, match="router logits of layer 0 are not all finite"):
        analyse(routing, ids)


@pytest.mark.parametrize(("has_difficulty", "names"), [(True, ["difficulty", "odds", "rarity"]), (False, ["rarity"])])
def test_pictures_are_drawn_as_png_and_svg_the_same_each_time(generator, tmp_path: Path, has_difficulty: bool, names):
    difficulty = torch.rand(N, generator=generator, dtype=torch.float64) if has_difficulty else None
    analysis = analyse(route(noise(generator, N, EXPERTS), difficulty), words(generator))
    files = draw_analysis(analysis, tmp_path / "pictures")
    expected = {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert {path.name for path in files} == {path.name for path in (tmp_path / "pictures").iterdir()} == expected
    draw_analysis(analysis, tmp_path / "again")
    for path in files:
        assert path.stat().st_size > 2000
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_collapsed_difficulty_can_be_drawn(generator, tmp_path: Path):
    difficulty = torch.full((N,), 1.0, dtype=torch.float64)
    analysis = analyse(route(noise(generator, N, EXPERTS), difficulty), words(generator))
    assert len(draw_analysis(analysis, tmp_path)) == 6
