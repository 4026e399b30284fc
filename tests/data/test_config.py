import pytest

from moxe.data.config import DataConfig
from moxe.errors import UserError


def test_the_cache_folder_is_set_by_the_environment(monkeypatch):
    monkeypatch.delenv("MOXE_CACHE", raising=False)
    assert DataConfig().cache_dir == "~/.cache/moxe"
    monkeypatch.setenv("MOXE_CACHE", "")
    assert DataConfig().cache_dir == "~/.cache/moxe"
    monkeypatch.setenv("MOXE_CACHE", "/elsewhere")
    assert DataConfig().cache_dir == "/elsewhere"
    assert DataConfig(cache_dir="/here").cache_dir == "/here"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sequence_length", 1),
        ("max_tokens", 1),
        ("vocab_size", 257),
        ("validation_fraction", 0.0),
        ("validation_fraction", 1.0),
        ("validation_documents", 0),
        ("num_workers", 0),
        ("num_workers", 1025),
        ("source", ""),
        ("validation_source", ""),
        ("tokenizer", ""),
        ("cache_dir", ""),
        ("text_field", ""),
        ("document_separator", "two\nlines"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=rf"data\.{key} is"):
        DataConfig(**{key: value})


def test_the_size_of_a_tokenizer_that_is_not_trained_here_does_not_matter():
    assert DataConfig(tokenizer="some/tokenizer.json", vocab_size=10).vocab_size == 10
