"""The C++ ops are compiled once, whole or not at all, and what is missing is said in a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moxe.ops.cpu import build

# A library that takes no time to compile; a second of sleep makes room for another process to get in the way.
SOURCE = '#include <torch/library.h>\nTORCH_LIBRARY_FRAGMENT(moxe_build_test, m) { m.def("nothing() -> ()"); }\n'
LOAD = """
import logging, sys, pathlib
from moxe.ops.cpu import build
logging.basicConfig(level=logging.WARNING, format="%(message)s")
build._OPS = pathlib.Path(sys.argv[1])
print(build.why_unavailable())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree with one small op, and an empty cache."""
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "nothing.cpp").write_text(SOURCE)
    monkeypatch.setenv("MOXE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_OPS", tmp_path / "ops")
    build.why_unavailable.cache_clear()
    monkeypatch.setattr(build, "why_unavailable", build.why_unavailable.__wrapped__)
    return tmp_path


def libraries(folder: Path) -> list[Path]:
    return sorted((folder / "cache").rglob("*.so"))


def load_in_a_process(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LOAD, str(folder / "ops")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("backend", ["cpu"])
def test_two_processes_at_once_compile_once(folder: Path, backend: str):
    processes = [load_in_a_process(folder) for _ in range(2)]
    outcomes = [process.communicate(timeout=240) for process in processes]
    assert [out.strip() for out, _ in outcomes] == ["None", "None"]
    assert sum("compiling the C++ ops" in err for _, err in outcomes) == 1
    assert len(libraries(folder)) == 1
    (of_user,) = (folder / "cache").iterdir()
    assert not [path for path in of_user.iterdir() if path.is_dir()]  # nothing half-made is left


@pytest.mark.parametrize("backend", ["cpu"])
def test_another_source_is_another_library(folder: Path, backend: str):
    names = {build._fingerprint("g++")}
    (folder / "ops" / "header.h").write_text("// new\n")
    names.add(build._fingerprint("g++"))
    (folder / "ops" / "nothing.cpp").write_text(SOURCE + "// changed\n")
    names.add(build._fingerprint("g++"))
    assert len(names) == 3


def test_a_compiler_that_is_not_there_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert build.why_unavailable().startswith("backend 'cpu': there is no compiler '/nowhere/g++': install one")
    assert not libraries(folder)


def test_without_any_compiler_it_says_how_to_get_one(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert "needs a C++ compiler and none was found: install one" in build.why_unavailable()
    with pytest.raises(build.CompilationError, match="none was found"):
        build.require()


@pytest.mark.parametrize("backend", ["cpu"])
def test_a_source_that_does_not_compile_is_reported_by_its_first_error_and_leaves_no_library(
    folder: Path, backend: str
):
    (folder / "ops" / "nothing.cpp").write_text("int broken( {\n")
    reason = build.why_unavailable()
    assert "failed:" in reason
    assert "nothing.cpp:1" in reason
    assert "\n" not in reason
    assert not libraries(folder)


def test_a_cache_that_can_not_be_written_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "file").write_text("")
    monkeypatch.setenv("MOXE_CACHE", str(folder / "file"))
    assert f"{folder / 'file'}" in build.why_unavailable()
    assert "can not be written" in build.why_unavailable()


@pytest.mark.parametrize("backend", ["cpu"])
def test_a_library_that_is_there_needs_no_writable_cache(folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch):
    assert build.why_unavailable() is None

    def refuse(*arguments: object) -> None:
        raise AssertionError("a lock was asked for")

    monkeypatch.setattr(build, "FileLock", refuse)
    assert build.why_unavailable() is None


@pytest.fixture
def library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library as compiling leaves it, which nothing can load."""
    monkeypatch.setattr(build.torch.ops, "load_library", lambda path: None)
    path = folder / "cache" / f"ops-{os.geteuid()}" / f"moxe-ops-{build._fingerprint('g++')}.so"
    path.parent.mkdir(mode=0o700, parents=True)
    path.write_bytes(b"")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702, 0o770])
def test_a_cache_that_others_can_write_is_refused(library: Path, backend: str, mode: int):
    assert build.why_unavailable() is None
    library.parent.chmod(mode)
    assert f"others may write {library.parent}:" in build.why_unavailable()
    library.unlink()
    assert f"others may write {library.parent}:" in build.why_unavailable()
    assert not list(library.parent.iterdir())  # nor is anything compiled there


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("mode", [0o757, 0o775])
def test_a_library_that_others_can_write_is_refused(library: Path, backend: str, mode: int):
    library.chmod(mode)
    assert f"others may write {library}:" in build.why_unavailable()


@pytest.mark.parametrize("backend", ["cpu"])
def test_a_cache_that_users_share_holds_a_private_folder_for_each(library: Path, backend: str):
    library.parent.parent.chmod(0o777)
    assert build.why_unavailable() is None


def test_a_file_of_another_user_is_refused_and_one_of_root_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch):
    path = folder / "library.so"
    path.write_bytes(b"")
    of_another = os.stat_result((0o100644, 0, 0, 1, 12345, os.getegid(), 0, 0, 0, 0))
    monkeypatch.setattr(Path, "stat", lambda self: of_another)
    with pytest.raises(build.CompilationError, match="belongs to another user"):
        build._require_private(path)
    monkeypatch.setattr(Path, "stat", lambda self: os.stat_result((0o100644, 0, 0, 1, 0, 0, 0, 0, 0, 0)))
    monkeypatch.setattr(build.os, "geteuid", lambda: 12345)
    build._require_private(path)
