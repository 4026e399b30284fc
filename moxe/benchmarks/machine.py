"""The machine and the process: what was measured on, the arithmetic that was allowed, the memory that was taken."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

import moxe
from moxe.ops.backend import resolve_backend

Precision = Literal["fp32", "fp32 medium", "bf16"]

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 1 << 30
# They change how the threads of a process work together.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_PROC_BIND", "GOMP_SPINCOUNT", "MKL_NUM_THREADS", "KMP_BLOCKTIME")


def describe_machine(threads: int | None = None) -> dict[str, Any]:
    """Processor, memory, threads, our backend, versions, date; `threads` instead of the number that torch uses here."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory("SC_PHYS_PAGES"),
        "threads": threads or torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
        "system": platform.platform(),
        "python": platform.python_version(),
        "backend": resolve_backend("auto", "cpu"),
        "moxe": moxe.__version__,
        **{package: _version(package) for package in ("torch", "transformers", "xlstm")},
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def available_memory() -> int | None:
    """Bytes that a process could take now; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="utf-8").splitlines() if meminfo.exists() else []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * kilobytes[0] if kilobytes else _memory("SC_AVPHYS_PAGES")


def _memory(pages: str) -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)
    except (ValueError, OSError):
        return None


@contextmanager
def arithmetic(precision: Precision) -> Iterator[None]:
    """Runs its body in a precision: float32 products as torch makes them, the same with "medium" allowed, or bf16
    autocast."""
    before = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, before)
        if precision == "fp32 medium":
            torch.set_float32_matmul_precision("medium")
        elif precision == "bf16":
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        yield


def tune_allocator() -> bool:
    """Lets this process keep the memory of big blocks it frees (glibc only); whether that was accepted.

    Otherwise each step gives its activations back to the system, and the next one pays for fresh pages.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(option, _KEEP_BYTES) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)])


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes.

    Linux counts in `ru_maxrss` what the process that started this one held; VmHWM begins with this program.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    import resource  # not on every system

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest
