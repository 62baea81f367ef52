"""What an open checkpoint is to its user: names, and for each one an abstract array and a way to read it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxq.array import QuantizedArray
from jaxq.checkpoints.files import count, refuse
from jaxq.progress import track_bytes

Select = str | Sequence[str] | Callable[[str], bool] | None

# Threads that read, and how many tensors they may be ahead of the one being placed: so many that they need not wait for
# it, and few for a device with memory of its own, where what is read ahead stands beside the arrays.
_WORKERS, _AHEAD = 2, 6


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of an open checkpoint.

    Attributes:
      abstract: what it loads as, with `jax.ShapeDtypeStruct`s for leaves: one, or a QuantizedArray of them.
      kind: its format in the file's own words: `BF16`, `Q4_K`, `gptq`.
      stored_bytes: bytes it takes in the file.
      read: reads the leaves of `abstract`, in `jax.tree.leaves`' order, as NumPy arrays.
      problem: why it can't be read, where its format is not served; then `abstract` is a guess.
    """

    abstract: Any
    kind: str
    stored_bytes: int
    read: Callable[[], Sequence[np.ndarray]]
    problem: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape: that of the dense weight."""
        return tuple(self.abstract.shape)

    @property
    def is_quantized(self) -> bool:
        return isinstance(self.abstract, QuantizedArray)

    @property
    def nbytes(self) -> int:
        """Bytes that the loaded leaves occupy."""
        return sum(count(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.abstract))

    def place(self, leaves: Sequence[np.ndarray]) -> Any:
        """What the leaves that `read` gave stand for, on JAX's default device."""
        return jax.tree.unflatten(jax.tree.structure(self.abstract), _place(leaves))


def dense(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """The abstract array of a tensor that is not quantized."""
    return jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))


class Checkpoint(Mapping[str, Any]):
    """An open checkpoint: a mapping from names to arrays, each read when it is asked for.

    Attributes:
      path: the file or directory.
      format: `mlx`, `gguf`, `gptq`, `awq`, `safetensors`; `jaxq` for a file of `jaxq.save`.
      config: the model's own description: `config.json`, or the metadata of a GGUF file.
      entries: what each name stands for, without reading it.
    """

    def __init__(self, path: Path, format: str, config: dict[str, Any], entries: Mapping[str, Entry]):
        self.path, self.format, self.config, self.entries = path, format, config, dict(entries)

    def __getitem__(self, name: str) -> Any:
        self.check_served([name])
        entry = self.entries[name]
        return entry.place(entry.read())

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __repr__(self) -> str:
        quantized = sum(entry.is_quantized for entry in self.entries.values())
        return f"Checkpoint({self.path}, {self.format}, {len(self)} tensors, {quantized} quantized)"

    def load(self, select: Select = None, *, progress: bool | None = None) -> dict[str, Any]:
        r"""Read tensors.

        Args:
          select: which: a regular expression found in the name (`layers\.0\.`), as in `quantize_tree`'s rules, several
            of them, or a predicate of the name; None for all.
          progress: whether to show a progress bar on stderr; None: from 2 GiB on, where stderr is a terminal.

        Returns:
          {name: jax.Array or QuantizedArray}, in the file's order. A 64-bit tensor is a NumPy array unless JAX's
          64-bit types are enabled.

        Raises:
          ValueError: an expression that is none, or that is found in no name.
          CheckpointError: a format that is not served, by tensor name; a file that changed since it was opened.
        """
        names = self.select(select)
        self.check_served(names)
        out, total = {}, sum(self.entries[name].stored_bytes for name in names)
        with track_bytes("load", total, progress, "loading") as advance:
            for name, leaves in self._read_ahead(names):
                out[name] = self.entries[name].place(leaves)
                advance(self.entries[name].stored_bytes)
        return out

    def check_served(self, names: Sequence[str] | None = None) -> None:
        """Raise CheckpointError where a tensor, of all or of these, is of a format that can't be read."""
        for name in self.entries if names is None else names:
            if problem := self.entries[name].problem:
                raise refuse(self.path, problem, name)

    def select(self, select: Select) -> list[str]:
        """The names that `select` takes, in the file's order; see `load`."""
        if select is None:
            return list(self.entries)
        if callable(select):
            return [name for name in self.entries if select(name)]
        patterns = [select] if isinstance(select, str) else list(select)
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"load: select={pattern!r} is no regular expression: {error}") from None
            if not any(re.search(pattern, name) for name in self.entries):
                some = ", ".join(map(repr, list(self.entries)[:3]))
                raise ValueError(f"load: select={pattern!r} is found in no name of {self.path}; they are like {some}")
        return [name for name in self.entries if any(re.search(pattern, name) for pattern in patterns)]

    def _read_ahead(self, names: Sequence[str]) -> Iterator[tuple[str, Sequence[np.ndarray]]]:
        """The leaves of each tensor in turn, while threads read the next few.

        Only reading happens in threads: JAX's default device and its other contexts are the caller's thread's own.
        """
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="jaxq-checkpoint") as pool:
            pending: dict[str, Any] = {}
            queue = iter(names)
            try:
                for name in names:
                    while len(pending) < _AHEAD and (ahead := next(queue, None)) is not None:
                        pending[ahead] = pool.submit(self.entries[ahead].read)
                    yield name, pending.pop(name).result()
            finally:
                for future in pending.values():
                    future.cancel()


def _place(leaves: Sequence[np.ndarray]) -> list[Any]:
    """On the device, in one call, which takes less time than several; 64-bit ones, which JAX would narrow, as they are.

    Those are dense, so they come alone.
    """
    narrowed = any(jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype for leaf in leaves)
    return list(leaves) if narrowed else jax.device_put(list(leaves))
