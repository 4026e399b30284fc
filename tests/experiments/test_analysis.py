"""A tiny model's analysis against plain loops over its documents, read one by one; then the command, end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moxe.cli import main
from moxe.data.tokenizer import train_tokenizer
from moxe.errors import UserError
from moxe.experiments.analysis import analyse_routing
from moxe.models.checkpoint import load_config
from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.observability.analysis import BANDS, MINIMUM_TOKENS
from tests.models.tiny import tiny_model
from tests.sentences import SENTENCES

# One longer than a chunk of the model's reading, several of unequal lengths, an empty one and one of a single token.
DOCUMENTS = [
    " ".join(SENTENCES[number % 4][shift:] for number in range(length))
    for shift, length in enumerate([40, 12, 25, 30, 7, 22, 18, 20])
] + ["", "a"]
K, EXPERTS = 2, 4


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(SENTENCES, vocab_size=290)


@pytest.fixture(scope="module")
def model() -> MoxEForCausalLM:
    return tiny_model(vocab_size=300)


def read_one_by_one(model: MoxEForCausalLM, tokenizer: PreTrainedTokenizerFast, length: int | None = None):
    """Input token, loss of the next, and per layer (d, adjusted logits, raw logits, experts) of every counted token."""
    tokens, losses = [], []
    layers: list[list[Any]] = [[] for _ in range(model.config.num_hidden_layers)]
    for document in DOCUMENTS:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(document, add_special_tokens=False)]
        step = length or len(ids)
        for begin in range(0, len(ids) - 1, step):
            window = ids[begin : begin + step + 1]
            with torch.no_grad():
                output = model(torch.tensor([window[:-1]]), output_router_logits=True)
            for place in range(begin == 0, len(window) - 1):
                tokens.append(window[place])
                losses.append(-output.logits[0, place].log_softmax(-1)[window[place + 1]].item())
                for layer, routing in zip(layers, output.routing, strict=True):
                    parts = (routing.difficulty, routing.logits, routing.unbiased_logits, routing.expert_indices)
                    layer.append(tuple(part[0, place].tolist() for part in parts))
    return tokens, losses, layers


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def covariance(x: list[float], y: list[float]) -> float:
    of_x, of_y = mean(x), mean(y)
    return mean([(a - of_x) * (b - of_y) for a, b in zip(x, y, strict=True)])


def ranks(values: list[float]) -> list[float]:
    order = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(order)))}
    last = {value: place for place, value in enumerate(order)}
    return [(first[value] + last[value]) / 2 + 1 for value in values]


def spearman(x: list[float], y: list[float]) -> float:
    of_x, of_y = ranks(x), ranks(y)
    return covariance(of_x, of_y) / math.sqrt(covariance(of_x, of_x) * covariance(of_y, of_y))


def log_odds(logits: list[float]) -> float:
    return math.log(sum(map(math.exp, logits[: EXPERTS // 2])) / sum(map(math.exp, logits[EXPERTS // 2 :])))


def entropy(logits: list[float]) -> float:
    total = sum(map(math.exp, logits))
    return -sum(math.exp(z) / total * math.log(math.exp(z) / total) for z in logits) / math.log(EXPERTS)


def omega_squared(values: list[float], groups: list[int]) -> float:
    members: dict[int, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    whole = mean(values)
    between = sum(len(group) * (mean(group) - whole) ** 2 for group in members.values())
    within = sum((value - mean(group)) ** 2 for group in members.values() for value in group)
    of_one = within / (len(values) - len(members))
    return (between - (len(members) - 1) * of_one) / (between + within + of_one)


def assert_likeliest(slope: float, x: list[float], successes: list[int]) -> None:
    """With the intercept that makes the expected successes add up, x is uncorrelated with what remains."""

    def expected(intercept: float) -> list[float]:
        return [K / (1 + math.exp(-intercept - slope * value)) for value in x]

    low, high = -50.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(expected(middle)) < sum(successes) else (low, middle)
    remains = [y - p for y, p in zip(successes, expected(low), strict=True)]
    assert covariance(x, remains) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("length", [None, 100])
def test_every_number_is_that_of_plain_loops_over_documents_read_one_by_one(model, tokenizer, length: int | None):
    tokens, losses, layers = read_one_by_one(model, tokenizer, length)
    analysis = analyse_routing(model, DOCUMENTS, tokenizer, context_length=length, batch_size=3)
    assert analysis.tokens == len(tokens) > MINIMUM_TOKENS
    assert analysis.documents == 8
    assert analysis.context_length == length
    assert analysis.loss == pytest.approx(mean(losses), rel=1e-5)  # float32
    rarity = [-math.log(tokens.count(token) / len(tokens)) for token in tokens]
    band = [int((rank - 0.5) / len(tokens) * BANDS) for rank in ranks(rarity)]
    for layer, found in zip(layers, analysis.layers, strict=True):
        d = [token[0] for token in layer]
        odds, raw = [log_odds(token[1]) for token in layer], [log_odds(token[2]) for token in layer]
        to_m = [sum(expert < EXPERTS // 2 for expert in token[3]) for token in layer]
        chosen = [expert for token in layer for expert in token[3]]
        share = [count / K for count in to_m]
        difficulty = found.difficulty
        assert difficulty is not None
        bins = [min(int(value * 20), 19) for value in d]
        slope = difficulty.assignment_slope
        assert slope is not None
        assert_likeliest(slope.value, d, to_m)
        assert difficulty.histogram == [bins.count(number) for number in range(20)]
        assert difficulty.collapsed is (covariance(d, d) < 1e-4)
        by_bin = [[value for value, place in zip(odds, bins, strict=True) if place == number] for number in range(20)]
        expected = {
            "load": [chosen.count(expert) / len(chosen) for expert in range(EXPERTS)],
            "mlstm_share": mean(share),
            "log_odds_mean": mean(odds),
            "mean": mean(d),
            "variance": covariance(d, d),
            "odds_by_bin": [mean(values) for values in by_bin if values],
            "odds_slope": covariance(d, odds) / covariance(d, d),
            "raw_odds_slope": covariance(d, raw) / covariance(d, d),
            "cancelled": -mean(raw) / (2 * model.config.gamma * mean(d)),
            "with_loss": spearman(d, losses),
            "with_entropy": spearman(d, [entropy(token[2]) for token in layer]),
            "with_rarity": spearman(d, rarity),
            "identity": omega_squared(d, tokens),
            "share_with_rarity": spearman(share, rarity),
            "share_slope": covariance(rarity, share) / covariance(rarity, rarity),
            "bands": [mean([s for s, b in zip(share, band, strict=True) if b == n]) for n in sorted(set(band))],
            "band_tokens": [band.count(number) for number in sorted(set(band))],
            "band_rarity": [mean([r for r, b in zip(rarity, band, strict=True) if b == n]) for n in sorted(set(band))],
        }
        actual = {
            "load": found.load,
            "mlstm_share": value(found.mlstm_share),
            "log_odds_mean": found.log_odds_mean,
            "mean": difficulty.mean,
            "variance": difficulty.variance,
            "odds_by_bin": [odds for odds in difficulty.log_odds_by_bin if odds is not None],
            "odds_slope": value(difficulty.odds_slope),
            "raw_odds_slope": value(difficulty.raw_odds_slope),
            "cancelled": value(difficulty.cancelled_bias),
            "with_loss": value(difficulty.with_loss),
            "with_entropy": value(difficulty.with_entropy),
            "with_rarity": value(difficulty.with_rarity),
            "identity": difficulty.identity_share,
            "share_with_rarity": value(found.share_with_rarity),
            "share_slope": value(found.share_slope),
            "bands": [value(band.mlstm_share) for band in found.bands],
            "band_tokens": [band.tokens for band in found.bands],
            "band_rarity": [band.rarity for band in found.bands],
        }
        for name, numbers in expected.items():
            bound = 1e-3 if name == "with_loss" else 1e-8  # two float32 losses may tie that float64 tells apart
            assert actual[name] == pytest.approx(numbers, rel=bound, abs=bound), name
        ordered = sorted(d)
        for quantile, found_quantile in zip((0.05, 0.25, 0.5, 0.75, 0.95), difficulty.quantiles, strict=True):
            place = quantile * (len(d) - 1)
            low, part = ordered[int(place)], place % 1
            assert found_quantile == pytest.approx(low + part * (ordered[math.ceil(place)] - low), rel=1e-9)


def value(estimate: Any) -> float:
    assert estimate is not None
    assert estimate.low <= estimate.value <= estimate.high
    return estimate.value


def test_the_batch_size_changes_nothing_and_the_seed_only_the_intervals(model, tokenizer):
    first = analyse_routing(model, DOCUMENTS, tokenizer, batch_size=1).to_dict()
    assert analyse_routing(model, DOCUMENTS, tokenizer, batch_size=8).to_dict() == first
    other = analyse_routing(model, DOCUMENTS, tokenizer, seed=1).to_dict()
    assert other != first
    assert without_intervals(other) == without_intervals(first)


def without_intervals(part: Any) -> Any:
    if isinstance(part, dict):
        return {
            name: without_intervals(item) for name, item in part.items() if name not in ("low", "high", "rare_to_m")
        }
    return [without_intervals(item) for item in part] if isinstance(part, list) else part


def test_only_so_many_tokens_are_read_as_asked_for(model, tokenizer):
    read = []

    def documents():
        for document in DOCUMENTS * 3:
            read.append(document)
            yield document

    analysis = analyse_routing(model, documents(), tokenizer, max_tokens=MINIMUM_TOKENS)
    assert analysis.tokens == MINIMUM_TOKENS
    assert len(read) < len(DOCUMENTS)


def test_a_model_without_difficulty_is_analysed_as_far_as_it_goes(tokenizer):
    analysis = analyse_routing(tiny_model(vocab_size=300, router_kind="standard"), DOCUMENTS, tokenizer)
    assert [layer.difficulty for layer in analysis.layers] == [None, None]
    assert all(layer.share_with_rarity is not None for layer in analysis.layers)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"documents": []}, "there is no text to analyse"),
        ({"documents": ["", "a"]}, "there is no text to analyse"),
        ({"documents": DOCUMENTS[:1]}, f"tokens to analyse, but at least {MINIMUM_TOKENS} are needed"),
        ({"max_tokens": 100}, f"100 tokens are too few for intervals: choose at least {MINIMUM_TOKENS}"),
        ({"context_length": 0}, "context_length=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_what_cannot_be_analysed_is_refused_in_one_sentence(model, tokenizer, settings: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        analyse_routing(model, settings.pop("documents", DOCUMENTS), tokenizer, **settings)


def test_a_model_without_a_router_and_one_with_another_vocabulary_are_refused(tokenizer):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(UserError, match="LlamaForCausalLM has no router to analyse"):
        analyse_routing(LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)), DOCUMENTS, tokenizer)
    with pytest.raises(UserError, match="the model's vocabulary has 200 tokens"):
        analyse_routing(tiny_model(vocab_size=200), DOCUMENTS, tokenizer)


# The command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny model that has learned a little, as a run leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    model = tiny_model(torch.float32, vocab_size=300)
    ids = torch.tensor([tokenizer.encode(DOCUMENTS[0])[:128]])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n<|endoftext|>\n".join(DOCUMENTS), encoding="utf-8")
    return path


def test_the_command_prints_tables_and_readings_and_writes_numbers_and_pictures(capsys, checkpoint, corpus, tmp_path):
    out = tmp_path / "out"
    assert main(["analyse", str(checkpoint), "--data", str(corpus), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for title in ("How the odds", "The difficulty d", "Rank correlation", "Share of group M", "Load"):
        assert f"\n{title}" in text
    assert text.count("\nlayer 0  ") == text.count("\nlayer 1: ") == 5
    pictures = {f"{name}.{suffix}" for name in ("odds", "difficulty", "rarity") for suffix in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == {"analysis.json", *pictures}
    assert all(str(out / name) in text for name in pictures)
    written = json.loads((out / "analysis.json").read_text())
    assert main(["analyse", str(checkpoint), "--data", str(corpus), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == written
    assert f"{written['tokens']:,} tokens of {corpus}" in text


def test_without_out_the_files_lie_in_the_checkpoint_which_stays_one(capsys, checkpoint, corpus):
    for _ in range(2):
        assert main(["analyse", str(checkpoint), "--data", str(corpus), "--tokens", "2600"]) == 0
    assert (checkpoint / "analysis" / "analysis.json").is_file()
    assert json.loads((checkpoint / "analysis" / "analysis.json").read_text())["tokens"] == 2600


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "nowhere.txt"], "nowhere.txt"),
        ([], "the following arguments are required: --data"),
        (["--data", "{empty}"], "empty"),
        (["--data", "{corpus}", "--tokens", "12"], "12 tokens are too few for intervals"),
        (["--data", "{corpus}", "--tokens", "0"], "'0' is not a whole number from 1"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, checkpoint, corpus, tmp_path, arguments, sentence: str):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    filled = [argument.format(empty=empty, corpus=corpus) for argument in arguments]
    assert main(["analyse", str(checkpoint), *filled, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moxe: ")
    assert captured.err.count("\n") == 1
    assert sentence in captured.err
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_router_is_refused(capsys, checkpoint, tmp_path, corpus):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=load_config(checkpoint).vocab_size, **sizes)).save_pretrained(tmp_path)
    for tokenizer in checkpoint.glob("tokenizer*"):
        (tmp_path / tokenizer.name).write_bytes(tokenizer.read_bytes())
    assert main(["analyse", str(tmp_path), "--data", str(corpus)]) == 2
    assert "LlamaForCausalLM has no router to analyse" in capsys.readouterr().err
