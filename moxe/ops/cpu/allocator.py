"""Keeps the memory of large tensors in the process between training steps.

Legend: none; no tensor appears here.

glibc gives every freed block above a threshold back to the system, and the next step pays for fresh pages again: most
tensors of a training step are above it.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Raises glibc's thresholds for the whole process; False where the allocator is another one.

    The process then holds on to the most memory it ever used. Blocks above 1 GiB still come and go (above 32 MiB with a
    glibc that takes no higher threshold).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    raised = libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)
    kept = libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    return bool(raised and kept)
