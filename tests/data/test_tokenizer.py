import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from moxe.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from moxe.errors import UserError

DOCUMENTS = [f"The cat number {i} sat on the mat, and the dog too." for i in range(50)]
TRAINED = train_tokenizer(DOCUMENTS, 300)


def words(*vocabulary, special=()):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def test_a_trained_tokenizer_has_the_size_and_special_tokens_that_are_promised():
    assert len(TRAINED) == 300
    assert TRAINED.convert_ids_to_tokens([0, 1]) == ["<|endoftext|>", "<|pad|>"]
    assert (TRAINED.bos_token_id, TRAINED.eos_token_id, TRAINED.pad_token_id) == (0, 0, 1)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_exactly(text):
    assert TRAINED.decode(TRAINED.encode(text, add_special_tokens=False, split_special_tokens=True)) == text


def test_training_is_deterministic():
    assert tokenizer_fingerprint(train_tokenizer(DOCUMENTS, 300)) == tokenizer_fingerprint(TRAINED)
    assert tokenizer_fingerprint(train_tokenizer(DOCUMENTS, 290)) != tokenizer_fingerprint(TRAINED)


def test_few_documents_give_a_smaller_vocabulary():
    assert len(train_tokenizer(["aaaa"], 4096)) < 300


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(UserError, match=r"vocab_size is 257; .* needs 258"):
        train_tokenizer(DOCUMENTS, 257)


def test_a_saved_tokenizer_loads_from_its_folder_and_its_file_and_through_transformers(tmp_path):
    TRAINED.save_pretrained(tmp_path)
    expected = TRAINED.encode("The cat and the dog")
    for loaded in (
        load_tokenizer(tmp_path),
        load_tokenizer(str(tmp_path / "tokenizer.json")),
        AutoTokenizer.from_pretrained(tmp_path),
    ):
        assert loaded.encode("The cat and the dog") == expected
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 0, 1)


def test_a_folder_with_nothing_but_a_tokenizer_json_is_enough(tmp_path):
    TRAINED.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).eos_token_id == 0


def test_the_end_of_a_document_is_found_in_a_bare_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    words("<unk>", "a", special=["<s>", "</s>"]).save(str(path))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == ("</s>", "</s>", "</s>")
    assert len(tokenizer) == 4


def test_a_bare_file_without_an_end_of_document_gets_one(tmp_path):
    path = tmp_path / "tokenizer.json"
    words("<unk>", "a").save(str(path))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, len(tokenizer)) == ("<|endoftext|>", 2, 3)


@pytest.mark.parametrize("content", [b"plain text", b"{}", b'{"model": {"type": "unknown"}}', b"", b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json' is no tokenizer\.json"):
        load_tokenizer(path)


def test_a_folder_whose_tokenizer_is_broken_is_refused(tmp_path):
    TRAINED.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["missing.json", "folder/missing.json", "./missing", "/missing"])
def test_a_missing_path_is_refused_at_once(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="There is no tokenizer at"):
        load_tokenizer(name)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="There is no tokenizer at"):
        load_tokenizer(tmp_path)


def test_a_name_that_the_hub_does_not_give_is_refused(monkeypatch):
    def fail(*_, **__):
        raise OSError("We couldn't connect to the hub\nand more lines")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(UserError, match=r"'owner/name' cannot be loaded.*: We couldn't connect to the hub\.$"):
        load_tokenizer("owner/name")


def test_a_slow_tokenizer_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: object())
    with pytest.raises(UserError, match="has no fast version"):
        load_tokenizer("owner/name")
