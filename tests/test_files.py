"""A file is whole or not there, and what failed leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from moxe.files import write_whole
from moxe.observability.figures import save


def draw(path: Path) -> None:
    save(Figure(), path)


def write(path: Path) -> None:
    write_whole(path, "new")


@pytest.mark.parametrize("write", [write, draw])
def test_a_folder_in_the_place_of_a_file_is_left_as_it_is(write, tmp_path: Path):
    folder = tmp_path / "file.png"
    folder.mkdir()
    with pytest.raises(IsADirectoryError):
        write(folder)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("write", [write, draw])
def test_a_failure_leaves_the_file_as_it_was_and_nothing_beside_it(
    write, error: BaseException, failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "file.png"
    path.write_text("old")

    def fail(*args: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(type(error)):
            write(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="missing"):
        write_whole(tmp_path / "missing" / "file", b"")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_has_the_format_of_its_name(suffix: str, tmp_path: Path):
    draw(tmp_path / f"picture.{suffix}")
    content = (tmp_path / f"picture.{suffix}").read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
