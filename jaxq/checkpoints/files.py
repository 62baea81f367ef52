"""What readers and writers share: bounded reads into aligned memory, and writes that appear whole or not at all."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import mmap
import os
import secrets
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

# XLA's CPU client adopts a host buffer in place of copying it when it begins on a multiple of this many bytes.
ALIGNMENT = 64
# x86's, and Arm's with pages of 4 kB.
HUGE_PAGE = 2 << 20
# Linux reads at most 0x7ffff000 bytes a call.
_READ_BYTES = 1 << 30
# The largest config or index read; Hugging Face's largest index is a few MB.
JSON_BYTES = 64 << 20
_MAX_DIMENSIONS = 32

if sys.byteorder != "little":  # every format here is little-endian, and arrays are views of its bytes
    raise ImportError("jaxq.checkpoints: only little-endian machines are supported")


class CheckpointError(ValueError):
    """A checkpoint that is truncated, inconsistent or of a format not served; names the tensor and the file."""


def refuse(path: Path, what: str, name: str | None = None) -> CheckpointError:
    """The error for `path`, with the tensor's name where there is one. Long names are cut: a file chose them."""
    if name is None:
        return CheckpointError(f"{path}: {what}")
    return CheckpointError(f"{path}: tensor {_shown(name)}: {what}")


def _shown(name: str) -> str:
    return repr(name) if len(name) <= 200 else f"{name[:200]!r}... ({len(name)} characters)"


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An uninitialized array that begins on a multiple of `ALIGNMENT` bytes, so that JAX on a CPU need not copy it."""
    (array,) = empty_together([jax.ShapeDtypeStruct(tuple(shape), dtype)])
    return array


def empty_together(structs: Sequence[jax.ShapeDtypeStruct]) -> list[np.ndarray]:
    """`empty` for each of some shapes and dtypes, in one piece of memory: for what lives and dies together."""
    sizes = [count(struct.shape) * struct.dtype.itemsize for struct in structs]
    starts = list(itertools.accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
    buffer = _aligned(starts.pop())
    return [
        buffer[start : start + size].view(struct.dtype).reshape(struct.shape)
        for start, size, struct in zip(starts, sizes, structs, strict=True)
    ]


def _aligned(nbytes: int) -> np.ndarray:
    """uint8[nbytes] on a multiple of `ALIGNMENT`; where it is large, of Linux's huge pages.

    Each page is a fault when it is first written, and those take more time than the writing: half of a load's.
    """
    if nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
        start = -buffer.ctypes.data % ALIGNMENT
        return buffer[start : start + nbytes]
    # What is not written takes no memory. The last page is a small one: a huge one is written whole.
    mapped = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer = np.frombuffer(mapped, np.uint8)
    start = -buffer.ctypes.data % HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without them
        mapped.madvise(mmap.MADV_HUGEPAGE, start, nbytes - nbytes % HUGE_PAGE)
    return buffer[start : start + nbytes]


def count(shape: Sequence[int]) -> int:
    """How many elements; in Python's integers, which no file can make overflow."""
    total = 1
    for length in shape:
        total *= length
    return total


def check_shape(shape: Any) -> tuple[int, ...]:
    """A shape that came from a file, as a tuple. Raises ValueError with a reason."""
    if not isinstance(shape, list | tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"its shape {str(shape)[:100]} is no list of sizes")
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"its shape has {len(shape)} dimensions; {_MAX_DIMENSIONS} at most are read")
    return tuple(shape)


class Source:
    """A file open for reading at offsets, from any thread. Closed with the last reference to it.

    Reads copy the bytes once, from the system's cache to memory that JAX adopts. A mapping would hold each page twice
    while it is copied, and would kill the process where somebody else truncates the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 the object lives as long as its entries
        self._lock = threading.Lock()
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """uint8[nbytes] from `offset` on. Raises CheckpointError where the file holds fewer."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise refuse(self.path, f"bytes {offset} to {offset + nbytes} lie outside the file of {self.size} bytes")
        out = empty((nbytes,), np.uint8)
        self.read_into(out, offset)
        return out

    def read_into(self, out: np.ndarray, offset: int) -> None:
        """Fill `out`, contiguous, from `offset` on."""
        view = out.reshape(-1).view(np.uint8).data if out.nbytes else memoryview(b"")
        done = 0
        while done < len(view):
            got = self._read_some(view[done : done + _READ_BYTES], offset + done)
            self.check_read(offset + done, got, 1)
            done += got

    @property
    def descriptor(self) -> int:
        """The file's, for who reads it otherwise; closed with the last reference to the source."""
        return self._file.fileno()

    def check_read(self, offset: int, got: int, due: int, name: str | None = None) -> None:
        """Raise CheckpointError where reading from `offset` on gave fewer bytes than are due, for tensor `name`."""
        if got < due:
            raise refuse(self.path, f"ends at byte {offset + got}; it was longer when it was opened", name)

    def _read_some(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], offset)
        with self._lock:  # Windows
            self._file.seek(offset)
            return self._file.readinto(view) or 0


def read_json(path: Path) -> Any:
    """A JSON file of at most `JSON_BYTES`. Raises CheckpointError where it is none."""
    source = Source(path)
    if source.size > JSON_BYTES:
        raise refuse(path, f"{source.size} bytes of JSON; {JSON_BYTES} at most are read")
    return parse_json(path, source.read(0, source.size).tobytes())


def parse_json(path: Path, text: bytes) -> Any:
    """JSON with no key twice in an object."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise refuse(path, "its JSON is nested too deeply") from None
    except ValueError as error:  # bad UTF-8 and bad JSON are both ValueErrors
        raise refuse(path, f"its JSON can't be read: {error}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        (twice, _), *_ = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {_shown(twice)} stands there twice")
    return out


# ---- writing


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write, which takes its name only when the block ends well, its bytes on the disk by then."""
    path = Path(path)
    aside = _aside(path)
    try:
        with open(aside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk's error names no file
            error.filename = str(path)
        raise
    _sync_directory(path.parent)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """A directory to fill, which takes its name only when the block ends well.

    Raises:
      FileExistsError: `path` exists, is not an empty directory, and `overwrite` is False.
    """
    path = Path(path)
    occupied = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if occupied and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it, or another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    aside.mkdir()
    try:
        yield aside
        if occupied:  # a directory can't be replaced in one step: move the old one away first
            old = _aside(path)
            os.rename(path, old)
            os.rename(aside, path)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            os.replace(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _sync_directory(path.parent)


def _aside(path: Path) -> Path:
    """A name in the same directory, hence on the same file system, that no reader looks for."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def _sync_directory(path: Path) -> None:
    """Make a rename in `path` survive a power cut, where the system lets a directory be synchronized."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
