"""Memory that the process holds, and how little of what it has freed stays with it."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 1 << 20


def frugal() -> None:
    """Have glibc give blocks of a megabyte and more back to the system when they are freed; for the whole process.

    Left alone it keeps blocks of up to 32 MiB, as soon as one of them was freed once: a fifth of a small model.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGE)


def release() -> None:
    """Hand back to the system the freed memory that glibc keeps, of which compiling leaves most."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Bytes of memory that the process holds, files mapped into it included; 0 where the system does not say so."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024
