from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moxe.data.config import DataConfig
from moxe.data.tokens import TokenDocuments, write_token_documents

HUB_TEXTS = [f"training text number {i}, {letter}" for i, letter in enumerate("abcdefgh")]

DOCUMENTS = [f"{a}{a} said to {b}{b} that {a} was first" for a in "abcdefghijklmnopqrst" for b in "abcde"]

WriteDocuments = Callable[..., TokenDocuments]


@pytest.fixture
def write_documents(tmp_path: Path) -> WriteDocuments:
    """Writes lists of token ids as tokenised documents."""
    count = 0

    def write(*documents: list[int], vocab_size: int = 100) -> TokenDocuments:
        nonlocal count
        count += 1
        arrays = (np.array(document, dtype=np.uint32) for document in documents)
        return write_token_documents(arrays, tmp_path / f"documents-{count}", vocab_size)

    return write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of DOCUMENTS."""
    path = tmp_path / "data" / "corpus.txt"
    path.parent.mkdir()
    path.write_text("\n<|endoftext|>\n".join(DOCUMENTS))
    return path


@pytest.fixture
def config(source: Path, tmp_path: Path) -> Callable[..., DataConfig]:
    """A configuration of the small source; keywords change it."""

    def make(**changes: Any) -> DataConfig:
        settings = {
            "source": str(source),
            "vocab_size": 300,
            "sequence_length": 16,
            "cache_dir": str(tmp_path / "cache"),
        }
        return DataConfig(**{**settings, **changes})

    return make


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seconds that were to be waited for the hub; nothing really waits."""
    seconds: list[int] = []
    monkeypatch.setattr("moxe.data.hub.sleep", seconds.append)
    return seconds


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a data set "owner/name" that `datasets` reads as it reads one of the hub: by name, streamed."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    # Seconds `datasets` waits after each shuffled pass for readers of large parquet files to end.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    folder = tmp_path / "hub" / "owner" / "name" / "data"
    folder.mkdir(parents=True)
    write_parquet(folder / "train-00000-of-00002.parquet", HUB_TEXTS[:4])
    write_parquet(folder / "train-00001-of-00002.parquet", HUB_TEXTS[4:])
    write_parquet(folder / "validation-00000-of-00001.parquet", ["a text to validate on", "another one"])

    import datasets

    load = datasets.load_dataset_builder

    def load_from_folder(name: str, subset: str | None, revision: str | None):
        if name != "owner/name":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub.")
        return load(str(folder.parent), subset, revision=revision)

    monkeypatch.setattr("datasets.load_dataset_builder", load_from_folder)
    return folder


def write_parquet(path: Path, texts: list, column: str = "text") -> None:
    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path)


@pytest.fixture
def asked_revisions(hub, monkeypatch):
    """The revisions that the hub is asked for, in order; it has a new one each time."""
    asked = []
    load = datasets.load_dataset_builder

    def remember(name, subset, revision):
        asked.append(revision)
        builder = load(name, subset, revision)
        builder.hash = f"revision {len(asked)}"
        return builder

    monkeypatch.setattr("datasets.load_dataset_builder", remember)
    return asked
