"""The text that the shipped model knows: the modules of Python's standard library, and some of them kept for tests."""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path

import numpy as np

BEGIN = 256  # before each file; the tokens below are bytes
PAD = 257
VOCABULARY = 272  # rows 258 and on are unused: whole vectors for every kernel

# Tests of the library and tables: little of either reads like a program.
_LEFT_OUT = ("site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__", "lib-dynload")
_LEFT_OUT_FILES = ("html/entities.py", "_sysconfigdata", "__phello__", "lib2to3/tests")
_ONE_IN = 20


def files(root: Path | None = None) -> list[str]:
    """Modules of the standard library, as sorted paths with slashes, relative to `root` (this Python's by default)."""
    root = standard_library() if root is None else root
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(
        path.as_posix()
        for path in found
        if not set(path.parts) & set(_LEFT_OUT) and not path.as_posix().startswith(_LEFT_OUT_FILES)
    )


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(path: str) -> bool:
    """Whether a file is kept for tests: by a hash of its path, so that every version of Python keeps the same ones."""
    return zlib.crc32(path.encode()) % _ONE_IN == 0


def encode(data: bytes) -> np.ndarray:
    """uint16[1 + bytes]: BEGIN, then the bytes."""
    return np.concatenate([np.array([BEGIN], np.uint16), np.frombuffer(data, np.uint8).astype(np.uint16)])


def stream(*, held_out: bool, root: Path | None = None) -> np.ndarray:
    """All the files of one part, one after the other: uint16[tokens]."""
    root = standard_library() if root is None else root
    chosen = [path for path in files(root) if is_held_out(path) == held_out]
    return np.concatenate([encode((root / path).read_bytes()) for path in chosen])


def windows(*, count: int, length: int, root: Path | None = None) -> np.ndarray:
    """Held-out text for a test: uint16[count, length + 1], windows at even distances, the same on every run."""
    text = stream(held_out=True, root=root)
    if len(text) <= length:
        raise ValueError(f"windows: length={length}, and the held-out files have only {len(text)} tokens")
    starts = np.linspace(0, len(text) - length - 1, count).astype(np.int64)
    return text[starts[:, None] + np.arange(length + 1)]
