"""Compiles the C++ ops for this machine on first use, keeps the library in the user's cache, and loads it.

Legend: none; no tensor appears here.

The library is named after everything it depends on (sources, flags, compiler, processor, torch), so a change of any of
them compiles anew and an old library is never loaded. A lock makes a second process wait instead of compiling too, and
the library appears under its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

logger = logging.getLogger(__name__)

_OPS = Path(__file__).parent.parent
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-w")
# Apple's compiler knows no OpenMP: one thread there.
_THREADS = () if sys.platform == "darwin" else ("-fopenmp",)
_HOW_TO_GET_ONE = "install one, for instance with `apt-get install g++`, or name it in the environment variable CXX"


class CompilationError(RuntimeError):
    """The C++ ops can not be had on this machine; the message says why and what would help."""


@cache
def why_unavailable() -> str | None:
    """Loads the library, compiling it if need be: None when it is there, else the reason in one sentence."""
    try:
        _load()
    except CompilationError as error:
        return str(error)
    return None


def require() -> None:
    """Loads the library.

    Raises:
        CompilationError: when there is no compiler or it fails.
    """
    if reason := why_unavailable():
        raise CompilationError(reason)


def cache_folder() -> Path:
    """Where compiled libraries are kept, a folder for each user in that of the environment variable MOXE_CACHE, or in
    ~/.cache/moxe, which users may share."""
    shared = Path(os.path.expanduser(os.environ.get("MOXE_CACHE") or "~/.cache/moxe"))
    return shared / (f"ops-{os.geteuid()}" if os.name == "posix" else "ops")


def sources() -> list[Path]:
    """The .cpp files, each one object of the library."""
    return sorted(_OPS.rglob("*.cpp"))


def _load() -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise CompilationError(f"backend 'cpu' needs a C++ compiler and none was found: {_HOW_TO_GET_ONE}")
    try:
        library = cache_folder() / f"moxe-ops-{_fingerprint(compiler)}.so"
        if not library.exists():
            library.parent.parent.mkdir(parents=True, exist_ok=True)
            library.parent.mkdir(mode=0o700, exist_ok=True)
            _require_private(library.parent)
            _compile_once(compiler, library)
        for path in (library.parent, library):
            _require_private(path)
        torch.ops.load_library(str(library))
    except CompilationError:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder, or no locks on this file system
        raise CompilationError(f"backend 'cpu': its library can not be written or loaded: {error}") from error


def _require_private(path: Path) -> None:
    """What is loaded runs: nobody but this user and root may be able to put something else in its place."""
    if os.name != "posix":
        return
    about = path.stat()
    if about.st_uid not in (os.geteuid(), 0):
        raise CompilationError(f"backend 'cpu': {path} belongs to another user: name your own folder in MOXE_CACHE")
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CompilationError(f"backend 'cpu': others may write {path}: take that right away, with chmod go-w")


def _compile_once(compiler: str, library: Path) -> None:
    with FileLock(f"{library}.lock"):
        if not library.exists():
            logger.warning("compiling the C++ ops into %s (once, about a minute)", library)
            _compile(compiler, library)


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256()
    for path in sorted([*_OPS.rglob("*.cpp"), *_OPS.rglob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    for part in (*_FLAGS, *_THREADS, torch.__version__, _version(compiler), _processor()):
        digest.update(part.encode() + b"\n")
    return digest.hexdigest()[:16]


def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("flags", "Features"))
    return platform.machine() + platform.processor()


def _compile(compiler: str, library: Path) -> None:
    from torch.utils import cpp_extension  # needs setuptools, which only those who compile must have

    includes = [f"-I{folder}" for folder in (_OPS, *cpp_extension.include_paths())]
    torch_libraries = [Path(folder) for folder in cpp_extension.library_paths()]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:

        def build(source: Path) -> str:
            target = f"{folder}/{source.parent.name}-{source.stem}.o"
            _run([compiler, *_FLAGS, *_THREADS, *includes, "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(build, sources()))
        unfinished = f"{folder}/{library.name}"
        # The OpenMP that torch brings, or a second set of threads would compete with torch's.
        own_threads = [str(path) for where in torch_libraries for path in where.glob("libgomp*.so*")][:1]
        where = [flag for path in torch_libraries for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
        libraries = ["-ltorch_cpu", "-lc10", *(own_threads or _THREADS)]
        _run([compiler, "-shared", *objects, *where, *libraries, "-o", unfinished])
        os.chmod(unfinished, 0o700)  # a umask may let the group write
        os.replace(unfinished, library)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, PermissionError):
        raise CompilationError(f"backend 'cpu': there is no compiler {command[0]!r}: {_HOW_TO_GET_ONE}") from None
    except subprocess.CalledProcessError as error:
        first_error = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr[-300:])
        raise CompilationError(f"backend 'cpu': {command[0]} failed: {first_error.strip()}") from None
    return done.stdout
