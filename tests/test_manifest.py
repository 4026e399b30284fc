"""A manifest finds every kind of damage, names it, and never leads out of its folder."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moxe.errors import PassingError
from moxe.manifest import MANIFEST, DamagedError, require_unchanged, verify_manifest, write_manifest

FILES = {"a.bin": b"some bytes", "b.json": b"{}", "inner/c.txt": b"text", "empty": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path)


def make(folder: Path) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder)
    return folder


def test_untouched_files_pass(folder: Path):
    assert verify_manifest(folder, required=FILES)
    assert {path.name for path in folder.iterdir()} == {"a.bin", "b.json", "inner", "empty", MANIFEST}


def test_a_folder_without_a_manifest_is_not_vouched_for(tmp_path: Path):
    assert not verify_manifest(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(DamagedError, match=f"{name} is missing"):
        verify_manifest(folder)


def test_a_longer_and_a_shorter_file_are_named(folder: Path):
    (folder / "a.bin").write_bytes(FILES["a.bin"] + b"x")
    with pytest.raises(DamagedError, match=r"a\.bin has 11 bytes, but 10 were written"):
        verify_manifest(folder)
    (folder / "a.bin").write_bytes(b"")
    with pytest.raises(DamagedError, match=r"a\.bin has 0 bytes"):
        verify_manifest(folder)


@pytest.mark.parametrize("bit", range(80))
def test_any_flipped_bit_is_found(folder: Path, bit: int):
    content = bytearray(FILES["a.bin"])
    content[bit // 8] ^= 1 << bit % 8
    (folder / "a.bin").write_bytes(content)
    with pytest.raises(DamagedError, match=r"a\.bin is not what was written"):
        verify_manifest(folder)


def test_only_the_files_asked_for_are_compared(folder: Path):
    (folder / "a.bin").write_bytes(b"")
    assert verify_manifest(folder, ["b*", "inner/*"])


def test_a_required_file_must_be_listed(folder: Path):
    with pytest.raises(DamagedError, match=r"does not list model\.safetensors"):
        verify_manifest(folder, required=["model.safetensors"])


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "inner/../../outside"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: str):
    (tmp_path / "outside").write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 6, "sha256": "0"}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DamagedError, match="leaves its folder"):
        verify_manifest(folder)


def test_a_link_may_lead_to_the_same_content_alone(tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder)
    (folder / "a.bin").unlink()
    (folder / "a.bin").symlink_to(tmp_path / "outside")
    (tmp_path / "outside").write_bytes(FILES["a.bin"])
    assert verify_manifest(folder)
    (tmp_path / "outside").write_bytes(b"other text")
    with pytest.raises(DamagedError, match=r"a\.bin is not what was written"):
        verify_manifest(folder)


def test_a_file_that_cannot_be_read_is_not_called_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", fail)
    with pytest.raises(PassingError, match=r"a\.bin cannot be read: Input/output error"):
        verify_manifest(folder)


@given(st.data())
def test_a_damaged_manifest_is_refused_or_says_the_same(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    folder = make(tmp_path_factory.mktemp("folder"))
    content = bytearray((folder / MANIFEST).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    (folder / MANIFEST).write_bytes(content)
    try:
        verify_manifest(folder, required=FILES)
    except DamagedError:
        return
    assert json.loads(content)["files"].keys() == FILES.keys()  # white space was put between the entries


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"version": 1}', '{"files": {}}', '{"version": 1, "files": {"a": 1}}', "[" * 100_000]
)
def test_what_is_no_manifest_is_refused(folder: Path, content: str):
    (folder / MANIFEST).write_text(content)
    with pytest.raises(DamagedError):
        verify_manifest(folder)


def test_who_meant_to_change_a_model_is_told_what_to_do(folder: Path):
    require_unchanged(folder, ["*"])
    (folder / "b.json").write_text("{1}")
    with pytest.raises(DamagedError, match=r"b\.json has 3 bytes.*; if the change was meant, remove .*json$"):
        require_unchanged(folder, ["*"])
