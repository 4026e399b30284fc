import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from moxe.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from moxe.errors import UserError
from moxe.manifest import MANIFEST, write_manifest

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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The files of a saved tokenizer, by name, and those of its folder with a manifest."""
    folder = tmp_path_factory.mktemp("saved")
    TRAINED.save_pretrained(folder)
    write_manifest(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files.keys() >= {"tokenizer.json", "tokenizer_config.json", MANIFEST}
    return files


@st.composite
def damages(draw):
    """A name, and what becomes of its content."""
    name, other = draw(st.permutations(["tokenizer.json", "tokenizer_config.json"]))
    kind = draw(st.sampled_from(["flip", "cut", "empty", "swap", "noise", "missing"]))
    place = draw(st.floats(0, 1, exclude_max=True))
    bit = draw(st.integers(0, 7))

    def damage(files):
        content = files[name]
        index = int(place * len(content))
        if kind == "flip":
            return content[:index] + bytes([content[index] ^ 1 << bit]) + content[index + 1 :]
        if kind == "noise":
            return content[:index] + b"\xff\x00{[" + content[index:]
        return {"cut": content[:index], "empty": b"", "swap": files[other], "missing": None}[kind]

    return name, damage


def write_damaged(folder, files, name, damage, manifest):
    for path in folder.iterdir():
        path.unlink()
    for other, content in {**files, name: damage(files)}.items():
        if content is not None and (manifest or other != MANIFEST):
            (folder / other).write_bytes(content)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(damages())
def test_a_damaged_tokenizer_with_a_manifest_is_refused_by_name(saved, tmp_path, change):
    name, damage = change
    write_damaged(tmp_path, saved, name, damage, manifest=True)
    with pytest.raises(UserError, match=name):
        load_tokenizer(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(damages())
def test_a_damaged_tokenizer_without_a_manifest_raises_nothing_but_user_errors(saved, tmp_path, change):
    name, damage = change
    write_damaged(tmp_path, saved, name, damage, manifest=False)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        try:
            tokenizer = load_tokenizer(path)
        except UserError:
            continue
        assert isinstance(tokenizer.eos_token_id, int)


def test_a_tokenizer_file_that_was_added_to_a_folder_with_a_manifest_is_refused(saved, tmp_path):
    write_damaged(tmp_path, saved, MANIFEST, lambda files: files[MANIFEST], manifest=True)
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) == tokenizer_fingerprint(TRAINED)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|pad|>"}')
    with pytest.raises(UserError, match=r"does not list special_tokens_map\.json"):
        load_tokenizer(tmp_path)


def test_no_code_of_a_tokenizer_is_run(saved, tmp_path):
    write_damaged(tmp_path, saved, MANIFEST, lambda files: files[MANIFEST], manifest=False)
    config = json.loads(saved["tokenizer_config.json"])
    config["tokenizer_class"] = "Other"
    config["auto_map"] = {"AutoTokenizer": ["code.Other", "code.Other"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()\nclass Other: pass\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "was_run").exists()
