"""What the page shows of a tiny model, against the model called once over the whole text; then the command."""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moxe.cli import main
from moxe.data.sources import read_documents
from moxe.data.tokenizer import train_tokenizer
from moxe.errors import UserError
from moxe.experiments import MOST_TOKENS, exploration
from moxe.experiments.exploration import corpus_of_run, explore, read_text
from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.observability.explorer.exploration import Exploration
from moxe.observability.memory import memory_of_experts, record_memory
from tests.models.tiny import tiny_model
from tests.sentences import SENTENCES

TEXT = "\n".join(SENTENCES[number % 4][number:] for number in range(40)) + " €5 \N{GRINNING FACE}\n"
K, EXPERTS = 2, 4


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(SENTENCES, vocab_size=290)


@pytest.fixture(scope="module")
def model() -> MoxEForCausalLM:
    return tiny_model(vocab_size=300).double().eval()


@pytest.fixture(scope="module")
def explored(model: MoxEForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Exploration:
    return explore(model, TEXT, tokenizer, name="tiny")


@pytest.fixture(scope="module")
def whole(model: MoxEForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The model's output over the start token and the whole text at once."""
    input_ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(TEXT, add_special_tokens=False)]])
    with torch.no_grad():
        return model(input_ids, output_router_logits=True)


def test_the_text_is_longer_than_a_chunk_of_its_reading(explored: Exploration):
    assert len(explored.pieces) > exploration.CHUNK_LENGTH


def test_the_pieces_are_the_text_one_a_token(explored: Exploration, tokenizer: PreTrainedTokenizerFast):
    assert "".join(explored.pieces) == TEXT
    assert explored.token_ids.tolist() == tokenizer.encode(TEXT, add_special_tokens=False)
    assert explored.pieces[-5:] == ["\N{GRINNING FACE}", "", "", "", "\n"]  # four bytes, four tokens


def test_losses_are_those_of_each_token_after_all_before_it(explored: Exploration, whole: Any):
    log_probabilities = whole.logits[0].log_softmax(-1)
    expected = [-log_probabilities[place, token].item() for place, token in enumerate(explored.token_ids)]
    np.testing.assert_allclose(explored.losses, expected, rtol=1e-9)


def test_the_likeliest_next_tokens_are_those_of_the_model(explored: Exploration, whole: Any):
    top = whole.logits[0, 1:].softmax(-1).topk(5)
    np.testing.assert_array_equal(explored.next_ids, top.indices.numpy())
    np.testing.assert_allclose(explored.next_probabilities, top.values.numpy(), rtol=1e-9)


def test_a_token_that_the_tokenizer_does_not_have_is_named_by_its_number(explored: Exploration, tokenizer):
    unknown = [token for token in explored.vocabulary if token >= len(tokenizer)]
    assert unknown  # the model has 300 tokens, and expects those of them that no text has as well as any
    assert all(explored.vocabulary[token] == f"[{token}]" for token in unknown)


def test_every_layer_shows_what_its_router_decided(explored: Exploration, whole: Any):
    assert len(explored.layers) == len(whole.routing)
    for layer, routing in zip(explored.layers, whole.routing, strict=True):
        logits = routing.logits[0, 1:].numpy()
        odds = np.exp(logits[:, :2]).sum(1) / np.exp(logits[:, 2:]).sum(1)
        raw = routing.unbiased_logits[0, 1:].softmax(-1)
        np.testing.assert_allclose(layer.difficulty, routing.difficulty[0, 1:], rtol=1e-9)
        np.testing.assert_allclose(layer.log_odds, np.log(odds), atol=1e-9)
        np.testing.assert_allclose(layer.entropy, -(raw * raw.log()).sum(-1) / math.log(EXPERTS), rtol=1e-9)
        weights = dict_of(routing.expert_indices[0, 1:], routing.expert_weights[0, 1:])
        assert dict_of(layer.experts, layer.weights) == [pytest.approx(of_token) for of_token in weights]
        assert (np.diff(layer.weights, axis=1) <= 0).all()
        counts = Counter(routing.expert_indices[0, 1:].flatten().tolist())
        np.testing.assert_allclose(layer.load, [counts[e] / counts.total() for e in range(EXPERTS)])


def dict_of(experts: Any, weights: Any) -> list[dict[int, float]]:
    """By token the weight of each of its experts."""
    return [dict(zip(map(int, e), map(float, w), strict=True)) for e, w in zip(experts, weights, strict=True)]


def test_the_slope_is_that_of_the_log_odds_on_the_difficulty(explored: Exploration):
    for layer in explored.layers:
        slope = layer.odds_slope
        assert slope is not None
        assert layer.difficulty is not None
        assert slope.value == pytest.approx(np.polyfit(layer.difficulty, layer.log_odds, 1)[0])
        assert layer.difficulty_variance == pytest.approx(np.var(layer.difficulty))
        assert (slope.low, slope.high) == (None, None)  # too short a text for an interval


def test_the_memory_is_that_of_the_same_text_read_at_once(explored: Exploration, model: MoxEForCausalLM, tokenizer):
    input_ids = torch.tensor([[tokenizer.bos_token_id, *explored.token_ids.tolist()]])
    with torch.no_grad(), record_memory(model) as recording:
        output = model(input_ids, output_router_logits=True)
    expected = memory_of_experts(recording, [routing.expert_indices[0] for routing in output.routing])
    for layer, of_layer in zip(explored.layers, expected, strict=True):
        for found, memory in zip(layer.memory, of_layer, strict=True):
            assert found is not None
            assert memory is not None
            assert (found.tokens, found.reach_bound) == (memory.tokens, memory.reach_bound)
            assert found.mean_forget_gate == pytest.approx(memory.mean_forget_gate)
            assert found.reach_quantiles == memory.reach_quantiles


def test_without_a_corpus_the_text_says_how_rare_its_tokens_are(explored: Exploration):
    counts = Counter(explored.token_ids.tolist())
    expected = [math.log(len(explored.token_ids) / counts[token]) for token in explored.token_ids.tolist()]
    np.testing.assert_allclose(explored.rarity, expected, rtol=1e-9)
    assert explored.corpus_tokens == explored.routed_tokens == len(explored.pieces)
    assert explored.corpus_name == "the text itself"


def test_a_corpus_says_how_rare_tokens_are_and_is_routed_passage_by_passage(
    model: MoxEForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(exploration, "_PASSAGE", 16)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(exploration, "explore_read_text", lambda *args, **kwargs: seen.update(corpus=args[3]))
    explore(model, "the sea", tokenizer, name="tiny", corpus=SENTENCES, corpus_name="sentences")
    corpus = seen["corpus"]
    ids = [tokenizer.encode(sentence, add_special_tokens=False) for sentence in SENTENCES]
    assert corpus.counts == Counter(token for sentence in ids for token in sentence)
    assert corpus.token_ids.tolist() == [token for sentence in ids for token in sentence]
    expected = []
    for sentence in ids:
        for begin in range(0, len(sentence), 16):
            passage = torch.tensor([[tokenizer.bos_token_id, *sentence[begin : begin + 16]]])
            with torch.no_grad():
                routing = model(passage, output_router_logits=True).routing
            expected.append([layer.expert_indices[0, 1:] for layer in routing])
    for layer, parts in enumerate(zip(*expected, strict=True)):
        np.testing.assert_array_equal(corpus.experts[layer], torch.cat(parts).numpy())


def test_of_a_large_corpus_passages_are_read_that_lie_evenly(model, tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exploration, "ROUTED_TOKENS", 30)
    monkeypatch.setattr(exploration, "_PASSAGE", 10)
    explored = explore(model, "the sea", tokenizer, name="tiny", corpus=SENTENCES * 10, corpus_name="sentences")
    assert 20 <= explored.routed_tokens <= 40
    assert explored.corpus_tokens == 10 * sum(len(tokenizer.encode(sentence)) for sentence in SENTENCES)


def test_a_corpus_is_counted_up_to_its_bound(model, tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exploration, "CORPUS_TOKENS", 25)
    explored = explore(model, "the sea", tokenizer, name="tiny", corpus=iter(SENTENCES * 3), corpus_name="sentences")
    assert explored.corpus_tokens == 25


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257])
def test_a_text_of_any_length_is_read_to_its_end(length: int, model: MoxEForCausalLM, tokenizer):
    explored = explore(model, TEXT, tokenizer, name="tiny", max_tokens=length)
    assert len(explored.pieces) == len(explored.losses) == len(explored.layers[0].log_odds) == length
    assert TEXT.startswith("".join(explored.pieces))


def test_the_numbers_are_plain_json(explored: Exploration):
    written = json.loads(json.dumps(explored.to_dict(), allow_nan=False))
    tokens = len(explored.pieces)
    assert len(written["next_ids"]) == 5 * tokens
    for layer, plain in zip(explored.layers, written["layers"], strict=True):
        assert len(plain["experts"]) == K * tokens
        np.testing.assert_allclose(plain["difficulty"], layer.difficulty, atol=5e-6)
    assert written["settings"]["num_experts"] == EXPERTS
    named = {*explored.token_ids.tolist(), *explored.next_ids.ravel().tolist()}
    assert written["vocabulary"].keys() == {str(token_id) for token_id in named}


def test_a_standard_router_has_no_difficulty_and_no_slope(tokenizer: PreTrainedTokenizerFast):
    explored = explore(tiny_model(vocab_size=300, router_kind="standard"), TEXT, tokenizer, name="tiny")
    for layer in explored.layers:
        assert layer.difficulty is layer.difficulty_variance is layer.odds_slope is None
        assert layer.is_collapsed is None
        assert np.isfinite(layer.log_odds).all()


def test_a_constant_difficulty_has_collapsed(tokenizer: PreTrainedTokenizerFast):
    model = tiny_model(vocab_size=300)
    with torch.no_grad():
        model.model.layers[0].router.difficulty_weight.zero_()
        model.model.layers[1].router.difficulty_weight.mul_(100)
    explored = explore(model, TEXT, tokenizer, name="tiny")
    assert [layer.is_collapsed for layer in explored.layers] == [True, False]
    assert explored.layers[0].odds_slope is None


def test_a_text_of_few_different_tokens_says_nothing_of_a_collapse(tokenizer: PreTrainedTokenizerFast):
    model = tiny_model(vocab_size=300)
    with torch.no_grad():
        model.model.layers[0].router.difficulty_weight.zero_()
    for text in ("a", "the old man " * 100):
        explored = explore(model, text, tokenizer, name="tiny")
        assert [layer.is_collapsed for layer in explored.layers] == [None, None]


@pytest.mark.parametrize("settings", [{"expert_memory": "token"}, {"expert_kind": "ffn"}])
def test_experts_without_memory_have_none_to_show(settings: dict[str, str], tokenizer: PreTrainedTokenizerFast):
    explored = explore(tiny_model(vocab_size=300, **settings), "the old man", tokenizer, name="tiny")
    assert [memory for layer in explored.layers for memory in layer.memory] == [None] * 2 * EXPERTS


def test_a_text_of_which_the_tokenizer_keeps_nothing_is_empty(model: MoxEForCausalLM):
    tokenizer = Tokenizer(models.BPE({"a": 0, "<s>": 1}, []))
    tokenizer.normalizer = normalizers.Replace("!", "")
    with pytest.raises(UserError, match="the text is empty"):
        explore(model, "!!", PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>"), name="tiny")


def test_a_start_token_outside_the_vocabulary_is_refused(tokenizer: PreTrainedTokenizerFast):
    longer = copy.deepcopy(tokenizer)
    longer.add_special_tokens({"bos_token": "<start>"})
    with pytest.raises(UserError, match=r"gives token id .* but the model's vocabulary has"):
        explore(tiny_model(vocab_size=len(tokenizer)), "the old man", longer, name="tiny")


def test_tokens_are_named_as_they_stand_in_a_text(model: MoxEForCausalLM):
    """A decoder in SentencePiece's way takes the space from a token that stands alone."""
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "\u2581": 1, "a": 2, "\u2581a": 3}, [("\u2581", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    explored = explore(model, "a a aa", fast, name="tiny")
    assert explored.vocabulary[2] == "a"
    assert explored.vocabulary[3] == " a"
    beyond = {token_id: name for token_id, name in explored.vocabulary.items() if token_id > 3}
    assert beyond == {token_id: f"[{token_id}]" for token_id in beyond}
    assert beyond  # the model has more tokens than the tokenizer, and expects some of them


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_an_empty_text_is_refused(text: str, model: MoxEForCausalLM, tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(UserError, match="the text is empty"):
        explore(model, text, tokenizer, name="tiny")


def test_a_text_that_is_too_long_is_refused_with_how_to_take_its_beginning(model, tokenizer, monkeypatch):
    monkeypatch.setattr(exploration, "MOST_TOKENS", 20)
    count = len(tokenizer.encode(SENTENCES[0]) + tokenizer.encode(SENTENCES[1]))
    with pytest.raises(UserError, match=rf"has {count} tokens, .* at most 20: --tokens 20 takes the first"):
        explore(model, SENTENCES[0] + SENTENCES[1], tokenizer, name="tiny")
    with pytest.raises(UserError, match="has more than 20 tokens"):  # not all of it was made into tokens
        explore(model, TEXT * 10, tokenizer, name="tiny")
    assert len(explore(model, TEXT * 10, tokenizer, name="tiny", max_tokens=20).pieces) == 20


def test_a_text_of_few_tokens_but_many_characters_is_taken_whole(model, tokenizer, monkeypatch):
    monkeypatch.setattr(exploration, "CHARACTERS_A_TOKEN", 1)
    monkeypatch.setattr(exploration, "MOST_TOKENS", 40)
    explored = explore(model, SENTENCES[0], tokenizer, name="tiny")
    assert "".join(explored.pieces) == SENTENCES[0]


@pytest.mark.parametrize("max_tokens", [0, -1, MOST_TOKENS + 1])
def test_a_number_of_tokens_that_no_page_shows_is_refused(max_tokens: int, model, tokenizer):
    with pytest.raises(UserError, match=f"max_tokens={max_tokens} is not a whole number from 1 to {MOST_TOKENS}"):
        explore(model, TEXT, tokenizer, name="tiny", max_tokens=max_tokens)


def test_a_model_without_the_router_is_refused_by_its_name(tokenizer: PreTrainedTokenizerFast):
    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    with pytest.raises(UserError, match="runs/dense is a LlamaForCausalLM, which has no entropy-aware router"):
        explore(dense, TEXT, tokenizer, name="runs/dense")


def test_a_token_outside_the_vocabulary_a_corpus_without_a_token_and_a_diverged_model_are_refused(tokenizer):
    with pytest.raises(UserError, match="but the model's vocabulary has 260 tokens"):
        explore(tiny_model(vocab_size=260), TEXT, tokenizer, name="tiny")
    model = tiny_model(vocab_size=300)
    with pytest.raises(UserError, match=r"empty\.txt has no token"):
        explore(model, TEXT, tokenizer, name="tiny", corpus=[""], corpus_name="empty.txt")
    with torch.no_grad():
        model.model.layers[1].router.weight.fill_(math.nan)
    with pytest.raises(UserError, match="not all finite"):
        explore(model, TEXT, tokenizer, name="tiny")


def test_the_corpus_of_a_run_is_the_built_in_one_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exploration, "read_documents", lambda source, **options: iter([f"{source}: a document"]))
    assert corpus_of_run(tmp_path) == {}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data:\n  source: builtin\n", encoding="utf-8")
    assert list(corpus_of_run(tmp_path)["corpus"]) == ["builtin: a document"]
    recipe.write_text("data:\n  source: /etc/passwd\n", encoding="utf-8")  # a file that somebody else's recipe names
    assert corpus_of_run(tmp_path) == {}
    recipe.write_text("data: [", encoding="utf-8")
    assert corpus_of_run(tmp_path) == {}


def test_a_text_file_is_read_whole_and_what_is_no_text_is_refused(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_bytes(
        "\ufeff\r\ncaf\N{LATIN SMALL LETTER E WITH ACUTE}\r\n\nol\N{LATIN SMALL LETTER E WITH ACUTE}\n".encode()
    )
    assert read_text(path) == "caf\N{LATIN SMALL LETTER E WITH ACUTE}\n\nol\N{LATIN SMALL LETTER E WITH ACUTE}"
    documents = read_documents(str(path), text_field="text", document_separator="<|endoftext|>")
    assert list(documents) == [read_text(path)]
    path.write_bytes(b"abc\xff")
    with pytest.raises(UserError, match="no text: it is not valid UTF-8 at byte 3"):
        read_text(path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    for out, sentence in [
        (tmp_path, "is a folder: name a file, such as"),
        (tmp_path / "file" / "new" / "page.html", "is no folder that you may write to"),
    ]:
        assert main(["explore", "no-such-checkpoint", "--prompt", "a", "--out", str(out)]) == 2
        assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def checkpoint(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny_model(vocab_size=300).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def page_data(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*)</script>', page.read_text(encoding="utf-8"))
    assert found is not None
    return json.loads(found[1])


def test_the_command_writes_the_page_of_a_prompt(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["explore", str(checkpoint), "--prompt", "the old man </script><b>"]) == 0
    data = page_data(checkpoint / "explore.html")
    (model,) = data["models"]
    assert data["text_name"] == "the prompt"
    assert "".join(model["pieces"]) == "the old man </script><b>"
    assert model["name"] == str(checkpoint)
    printed = capsys.readouterr().out
    assert f"{len(model['pieces'])} tokens, loss" in printed
    assert "from the text itself" in printed
    assert "explore.html" in printed


def test_the_command_compares_two_checkpoints_over_a_file_beside_a_corpus(checkpoint: Path, tmp_path: Path):
    text, corpus, page = tmp_path / "my text.txt", tmp_path / "corpus.txt", tmp_path / "new" / "page.html"
    text.write_text(TEXT, encoding="utf-8")
    corpus.write_text("\n<|endoftext|>\n".join(SENTENCES), encoding="utf-8")
    arguments = ["--text", str(text), "--tokens", "50", "--corpus", str(corpus), "--out", str(page)]
    assert main(["explore", str(checkpoint), str(checkpoint), *arguments]) == 0
    data = page_data(page)
    assert data["text_name"] == "my text.txt"
    assert [len(model["pieces"]) for model in data["models"]] == [50, 50]
    assert data["models"][0]["corpus"]["name"] == str(corpus)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "say what the model reads: --text FILE or --prompt TEXT"),
        (["--prompt", "a", "--text", "b"], "--text and --prompt both say what the model reads: give one of them"),
        (["--prompt", "\udcff"], "the text is not valid UTF-8 at character 1"),
        (["--prompt", " "], "the text is empty: there is nothing to explore"),
        (["--text", "no-such-file.txt"], "the text 'no-such-file.txt' cannot be read: No such file or directory"),
        (["--prompt", "a", "--tokens", "0"], "argument --tokens: '0' is not a whole number from 1 to 20000"),
        (["--prompt", "a", "--corpus", "no-such-corpus.txt"], "no-such-corpus.txt"),
        (["second", "third", "--prompt", "a"], "3 checkpoints are too many: a page shows one, or two side by side"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    arguments: list[str], sentence: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    page = tmp_path / "page.html"
    assert main(["explore", str(checkpoint), *arguments, "--out", str(page)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
