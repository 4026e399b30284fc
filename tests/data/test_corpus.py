import json
from itertools import islice

import pytest
import torch

from moxe.data import corpus as corpus_module
from moxe.data import sources
from moxe.data.config import DataConfig
from moxe.data.corpus import prepare
from moxe.data.packing import PackedDataset, PackedStream
from moxe.data.tokenizer import train_tokenizer
from moxe.errors import UserError
from tests.data.conftest import DOCUMENTS, HUB_TEXTS, write_parquet


def texts_of(dataset: PackedDataset, tokenizer) -> list[str]:
    return [tokenizer.decode(ids[1:-1].tolist()) for ids in dataset.documents]


def test_each_document_is_either_trained_on_or_held_out(config):
    corpus = prepare(config(), seed=0)
    trained = texts_of(corpus.train, corpus.tokenizer)
    assert sorted(trained + corpus.validation_texts) == sorted(DOCUMENTS)
    assert texts_of(corpus.validation, corpus.tokenizer) == corpus.validation_texts
    assert 0 < len(corpus.validation_texts) < 20


def test_statistics_count_what_is_there(config):
    corpus = prepare(config(), seed=0)
    statistics = corpus.statistics
    assert statistics.train_documents == len(DOCUMENTS) - len(corpus.validation_texts)
    assert statistics.validation_documents == len(corpus.validation_texts)
    assert statistics.validation_bytes == sum(len(text) for text in corpus.validation_texts)
    rows = [*corpus.train, *corpus.validation]
    total = sum(int(row["attention_mask"].sum()) for row in rows)
    assert statistics.train_tokens + statistics.validation_tokens == total
    assert statistics.vocab_size == len(corpus.tokenizer) == 300
    assert not statistics.cached


def test_the_held_out_part_depends_on_neither_seed_nor_tokenizer_nor_max_tokens(config, tmp_path):
    path = tmp_path / "tokenizer.json"
    train_tokenizer(DOCUMENTS, 280).save_pretrained(tmp_path)
    expected = prepare(config(), seed=0).validation_texts
    assert prepare(config(), seed=1).validation_texts == expected
    assert prepare(config(tokenizer=str(path)), seed=0).validation_texts == expected
    assert prepare(config(max_tokens=100), seed=0).validation_texts == expected


def test_the_seed_shuffles_training_documents_alone(config):
    first, again, other = (prepare(config(), seed=seed) for seed in (0, 0, 1))
    rows = [torch.stack([row["input_ids"] for row in corpus.train]) for corpus in (first, again, other)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert [row["input_ids"].tolist() for row in first.validation] == [
        row["input_ids"].tolist() for row in other.validation
    ]


def test_a_second_run_takes_its_tokens_from_the_cache(config, monkeypatch):
    first = prepare(config(), seed=0)
    monkeypatch.setattr("moxe.data.build.read_places", None)
    second = prepare(config(sequence_length=8), seed=3)
    assert second.statistics.cached
    assert second.statistics.train_tokens == first.statistics.train_tokens
    assert second.validation_texts == first.validation_texts


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 301},
        {"max_tokens": 100},
        {"validation_fraction": 0.2},
        {"validation_documents": 3},
        {"document_separator": "---"},
    ],
)
def test_a_change_of_what_decides_the_tokens_is_not_taken_from_the_cache(config, source, change):
    prepare(config(), seed=0)
    source.write_text(source.read_text() + "\n---\nanother document")
    prepare(config(), seed=0)
    assert not prepare(config(**change), seed=0).statistics.cached


def test_a_change_of_the_files_is_noticed_and_a_change_of_their_place_does_not_matter(config, source, tmp_path):
    prepare(config(), seed=0)
    moved = source.rename(tmp_path / "moved.txt")
    assert prepare(config(source=str(moved)), seed=0).statistics.cached
    moved.write_text(moved.read_text() + "!")
    assert not prepare(config(source=str(moved)), seed=0).statistics.cached


def test_max_tokens_is_met_exactly(config):
    corpus = prepare(config(max_tokens=101), seed=0)
    assert corpus.statistics.train_tokens == 101
    assert len(corpus.train) == 7


def test_a_number_of_documents_can_be_held_out(config):
    assert len(prepare(config(validation_documents=7), seed=0).validation_texts) == 7


def test_a_validation_source_is_read_whole_and_none_of_it_trained_on(config, tmp_path):
    path = tmp_path / "validation.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["something else", DOCUMENTS[0].upper()]))
    corpus = prepare(config(validation_source=str(path)), seed=0)
    assert corpus.validation_texts == ["something else", DOCUMENTS[0].upper()]
    assert texts_of(corpus.train, corpus.tokenizer) == DOCUMENTS[1:]
    corpus = prepare(config(validation_source=str(path), validation_documents=1), seed=0)
    assert corpus.validation_texts == ["something else"]


def test_a_source_that_is_all_validation_is_refused(config, source):
    with pytest.raises(UserError, match=r"No document of the training source .* is left"):
        prepare(config(validation_source=str(source)), seed=0)


def test_a_tokenizer_is_trained_without_the_held_out_documents(config, tmp_path):
    path = tmp_path / "validation.txt"
    path.write_text("zzzzqqqq " * 100)
    corpus = prepare(config(validation_source=str(path), vocab_size=1000), seed=0)
    assert "zz" not in corpus.tokenizer.get_vocab()


@pytest.mark.parametrize("key", ["source", "tokenizer"])
def test_the_folder_of_a_user_who_is_not_there_does_not_exist(config, key):
    with pytest.raises(UserError, match="'~nobody-of-this-name'"):
        prepare(config(**{key: "~nobody-of-this-name"}), seed=0)


def test_a_cache_of_a_user_who_is_not_there_is_a_folder_of_that_name(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(config(cache_dir="~nobody-of-this-name"), seed=0)
    assert (tmp_path / "~nobody-of-this-name").is_dir()


def test_the_files_are_looked_up_once(config, monkeypatch):
    asked = []
    find_files = sources.find_files
    monkeypatch.setattr(sources, "find_files", lambda name: asked.append(name) or find_files(name))
    prepare(config(), seed=0)
    assert len(asked) == 1


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_every_part_of_a_hub_data_set_is_of_one_revision(hub, config, asked_revisions, max_tokens):
    corpus = prepare(config(source="owner/name", validation_documents=1, max_tokens=max_tokens), seed=0)
    list(islice(corpus.train, 40))
    assert asked_revisions[0] is None
    assert len(asked_revisions) >= 4
    assert set(asked_revisions[1:]) == {"revision 1"}


def test_a_tokenizer_file_is_used_as_it_is(config, tmp_path):
    train_tokenizer(["entirely other words"], 265).save_pretrained(tmp_path)
    corpus = prepare(config(tokenizer=str(tmp_path / "tokenizer.json")), seed=0)
    assert len(corpus.tokenizer) == 265
    assert set(texts_of(corpus.train, corpus.tokenizer)) < set(DOCUMENTS)


def test_a_cache_folder_that_cannot_be_written_is_a_user_error(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"data\.cache_dir .* cannot be written"):
        prepare(config(cache_dir=str(tmp_path / "file")), seed=0)


@pytest.mark.parametrize("key", ["subset", "validation_split"])
def test_settings_of_the_hub_are_refused_for_local_data(config, key):
    with pytest.raises(UserError, match=rf"data\.{key} is 'x', but .* is no hub data set"):
        prepare(config(**{key: "x"}), seed=0)


def test_the_builtin_corpus_needs_no_setting(tmp_path):
    corpus = prepare(DataConfig(cache_dir=str(tmp_path)), seed=0)
    assert len(corpus.tokenizer) == 4096
    assert corpus.statistics.train_tokens > 300_000
    assert 10 < len(corpus.validation_texts) < 100
    shared = set(corpus.validation_texts) & set(texts_of(corpus.train, corpus.tokenizer))
    assert not shared


def first_pass(stream):
    """The rows of a stream before its documents come again."""
    rows = []
    for row in stream:
        place = stream.state_at(len(rows) + 1)
        if place["epoch"] > 0 and place["block"] is not None:
            return rows
        rows.append(row)


def test_a_hub_data_set_is_streamed_without_its_held_out_documents(hub, config):
    corpus = prepare(config(source="owner/name", validation_documents=3), seed=0)
    assert corpus.validation_texts == HUB_TEXTS[:3]
    assert isinstance(corpus.train, PackedStream)
    assert (corpus.statistics.train_documents, corpus.statistics.train_tokens) == (None, None)
    tokens = torch.cat([row["input_ids"][row["attention_mask"].bool()] for row in first_pass(corpus.train)])
    text = corpus.tokenizer.decode(tokens, skip_special_tokens=True)
    assert all(document in text for document in HUB_TEXTS[3:])
    assert not any(document in text for document in HUB_TEXTS[:3])


def test_a_streams_order_is_the_seeds_and_changes_from_one_pass_to_the_next(hub, config):
    def order(seed):
        stream = prepare(config(source="owner/name", validation_documents=1), seed=seed).train
        assert isinstance(stream, PackedStream)
        length = len(first_pass(stream))
        rows = [row["input_ids"].tolist() for row in islice(stream, 2 * length)]
        return rows[:length], rows[length:]

    assert order(0) == order(0)
    assert order(0)[0] != order(1)[0]
    assert order(0)[0] != order(0)[1]


def test_a_hub_data_set_with_max_tokens_is_kept_as_tokens(hub, config):
    settings = config(source="owner/name", validation_documents=3, max_tokens=40)
    corpus = prepare(settings, seed=0)
    assert isinstance(corpus.train, PackedDataset)
    assert corpus.statistics.train_tokens == 40
    assert prepare(settings, seed=1).statistics.cached


def test_a_split_of_the_hub_can_be_the_validation_data(hub, config):
    corpus = prepare(config(source="owner/name", validation_split="validation", max_tokens=10_000), seed=0)
    assert corpus.validation_texts == ["a text to validate on", "another one"]
    assert corpus.statistics.train_documents == 8


def test_another_source_can_be_the_validation_data_of_a_hub_data_set(hub, config, source):
    corpus = prepare(config(source="owner/name", validation_source=str(source), max_tokens=10_000), seed=0)
    assert corpus.validation_texts == DOCUMENTS
    assert corpus.statistics.train_documents == 8


def test_a_hub_data_set_too_small_for_its_held_out_part_is_refused(hub, config):
    with pytest.raises(UserError, match="all are in the validation data"):
        prepare(config(source="owner/name", max_tokens=10_000), seed=0)


def test_the_fingerprint_is_that_of_the_tokens_and_the_tokenizer(config, source, tmp_path):
    fingerprint = prepare(config(), seed=0).fingerprint
    assert len(bytes.fromhex(fingerprint)) == 32
    assert prepare(config(sequence_length=8, num_workers=1), seed=1).fingerprint == fingerprint
    assert prepare(config(cache_dir=str(tmp_path / "other")), seed=0).fingerprint == fingerprint
    changes = [{"max_tokens": 1000}, {"validation_documents": 2}, {"vocab_size": 290}]
    others = [prepare(config(**change), seed=0).fingerprint for change in changes]
    source.write_text(source.read_text() + "!")
    others.append(prepare(config(), seed=0).fingerprint)
    assert len({fingerprint, *others}) == 5


def test_the_fingerprint_of_a_stream_is_that_of_its_revision_and_how_it_is_read(hub, config):
    fingerprint = prepare(config(source="owner/name", validation_documents=3), seed=0).fingerprint
    assert prepare(config(source="owner/name", validation_documents=3), seed=1).fingerprint == fingerprint
    assert prepare(config(source="owner/name", validation_documents=2), seed=0).fingerprint != fingerprint
    write_parquet(hub / "train-00001-of-00002.parquet", ["other", "texts"])
    assert prepare(config(source="owner/name", validation_documents=3), seed=0).fingerprint != fingerprint


@pytest.mark.parametrize("documents_a_block", [1, 2, 3, 100])
def test_a_stream_of_the_hub_goes_on_after_any_row(hub, config, monkeypatch, documents_a_block):
    monkeypatch.setattr("moxe.data.corpus.SHUFFLE_BUFFER_DOCUMENTS", documents_a_block)

    def stream():
        corpus = prepare(config(source="owner/name", validation_documents=2, sequence_length=3), seed=3)
        assert isinstance(corpus.train, PackedStream)
        return corpus.train

    def ids_of(rows):
        return [row["input_ids"].tolist() for row in rows]

    whole = stream()
    length = 2 * len(first_pass(whole))
    assert length > 10
    expected = ids_of(islice(whole, length))
    for rows in range(length):
        again = stream()
        again.resume(json.loads(json.dumps(whole.state_at(rows))))
        assert ids_of(islice(again, length))[rows:] == expected[rows:]


def test_documents_before_the_block_are_not_given_again(hub, config, monkeypatch):
    monkeypatch.setattr("moxe.data.corpus.SHUFFLE_BUFFER_DOCUMENTS", 2)
    read = []
    tokenize = corpus_module.tokenize_documents
    monkeypatch.setattr(
        corpus_module,
        "tokenize_documents",
        lambda texts, tokenizer: tokenize((read.append(t) or t for t in texts), tokenizer),
    )
    stream = prepare(config(source="owner/name", validation_documents=2), seed=3).train
    assert isinstance(stream, PackedStream)
    rows = len(first_pass(stream))
    assert set(read) == set(HUB_TEXTS[2:])
    state = stream.state_at(rows - 1)
    read.clear()
    stream.resume(state)
    list(islice(stream, rows))
    assert 0 < len(read) <= 4
