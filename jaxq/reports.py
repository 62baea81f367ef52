"""What a tree of weights occupies, and what quantization cost it: per leaf and in total."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.array import QuantizedArray, is_quantized
from jaxq.conventions import path_string, why_dense


@dataclasses.dataclass(frozen=True)
class Row:
    """One array of a tree.

    Attributes:
      path: where it stands, as `params/Dense_0/kernel`.
      shape: logical.
      format: `int4g64`, `mxfp4`, ...; the name of the dtype where it is dense.
      axis: the grouped axes; None where it is dense.
      weights: how many.
      nbytes: what it occupies.
      dense_nbytes: what it would occupy dense, in its original dtype where that is known, else in that of its scales.
      relative_error: Frobenius norm of (dequantized - original) over that of the original; None where unknown.
      note: why it is dense; "" where it is quantized.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    axis: tuple[int, ...] | None
    weights: int
    nbytes: int
    dense_nbytes: int
    relative_error: float | None = None
    note: str = ""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights if self.weights else 0.0


@dataclasses.dataclass
class Report:
    """Rows, one per array. `print` shows a table; `to_dicts` is for everything else."""

    rows: list[Row] = dataclasses.field(default_factory=list)

    @property
    def weights(self) -> int:
        """How many weights in all."""
        return sum(row.weights for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes that all the arrays occupy."""
        return sum(row.nbytes for row in self.rows)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that all the arrays would occupy dense."""
        return sum(row.dense_nbytes for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights if self.weights else 0.0

    @property
    def quantized(self) -> list[Row]:
        return [row for row in self.rows if row.axis is not None]

    @property
    def skipped(self) -> list[Row]:
        """What is dense, each with its reason in `note`."""
        return [row for row in self.rows if row.axis is None]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Per row a dict of the attributes of `Row` and its `bits_per_weight`, ready for JSON."""
        return [dataclasses.asdict(row) | {"bits_per_weight": row.bits_per_weight} for row in self.rows]

    def __str__(self) -> str:
        head = ("path", "shape", "format", "bytes", "bits/weight", "error", "note")
        body = [
            (
                row.path,
                "x".join(map(str, row.shape)),
                row.format,
                f"{row.nbytes:,}",
                f"{row.bits_per_weight:.2f}",
                "" if row.relative_error is None else f"{row.relative_error:.4f}",
                row.note,
            )
            for row in self.rows
        ]
        total = ("total", f"{self.weights:,}", "", f"{self.nbytes:,}", f"{self.bits_per_weight:.2f}", "", "")
        widths = [max(map(len, column)) for column in zip(head, *body, total, strict=True)]
        right = (False, False, False, True, True, True, False)
        lines = [
            "  ".join(
                cell.rjust(width) if r else cell.ljust(width)
                for cell, width, r in zip(line, widths, right, strict=True)
            ).rstrip()
            for line in (head, *body, total)
        ]
        rule = "-" * max(map(len, lines))
        saved = f"{len(self.quantized)} of {len(self.rows)} arrays quantized; dense: {self.dense_nbytes:,} bytes"
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], saved])


def report(tree: Any, original: Any = None) -> Report:
    """What a tree of weights occupies.

    Args:
      tree: any pytree with QuantizedArrays in it; leaves that are no arrays are passed over.
      original: the tree that it was made from, for the relative errors; None, and they stay unknown.
        `quantize_tree(..., report=)` finds them on the way, before it frees anything.

    Raises:
      ValueError: where the arrays of `original` don't match those of `tree`.
    """
    leaves = array_leaves(tree)
    before = dict(array_leaves(original)) if original is not None else {}
    dense = [(path, leaf) for path, leaf in leaves if not is_quantized(leaf)]
    notes = dict(
        zip((p for p, _ in dense), why_dense(dense, {q.spec for _, q in leaves if is_quantized(q)}), strict=True)
    )
    rows = []
    for path, leaf in leaves:
        if original is not None and (path not in before or tuple(before[path].shape) != tuple(leaf.shape)):
            came = f"has shape {tuple(before[path].shape)}" if path in before else "is missing"
            raise ValueError(f"report: {path} {came} in original; in tree it has shape {tuple(leaf.shape)}")
        w, error = before.get(path), None
        if is_quantized(leaf) and w is not None and not is_quantized(w):
            error = relative_error(leaf, w)
        rows.append(row(path, leaf, original=None if is_quantized(w) else w, error=error, note=notes.get(path, "")))
    return Report(rows)


def row(path: str, leaf: Any, *, original: Any = None, error: float | None = None, note: str = "") -> Row:
    """The row of one array; `original` is what it was made from, of which only the dtype is looked at."""
    size = math.prod(leaf.shape)
    if not is_quantized(leaf):
        nbytes = size * _itemsize(leaf)
        return Row(path, tuple(leaf.shape), str(leaf.dtype), None, size, nbytes, nbytes, note=note)
    itemsize = leaf.float_dtype.itemsize if original is None else _itemsize(original)
    return Row(path, leaf.shape, str(leaf.spec), leaf.axis, size, leaf.nbytes, size * itemsize, error, note)


def relative_error(qw: QuantizedArray, w: Any) -> float:
    """The Frobenius norm of (dequantized - w) over that of w, in float32; 0 where both are zero."""
    difference, norm = (float(x) for x in _norms(qw, jnp.asarray(w)))
    return difference / norm if norm else (math.inf if difference else 0.0)


@jax.jit
def _norms(qw: QuantizedArray, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    w = w.astype(jnp.float32)
    return jnp.linalg.norm((qw.dequantize(jnp.float32) - w).ravel()), jnp.linalg.norm(w.ravel())


def array_leaves(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of every array and QuantizedArray of a tree, in the order of the tree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)
    return [(path_string(path), leaf) for path, leaf in flat if is_array(leaf)]


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype: arrays, quantized or not, and abstract ones."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _itemsize(leaf: Any) -> int:
    """Bytes per element; of keys, what their words occupy."""
    return leaf.dtype.itemsize if hasattr(leaf.dtype, "itemsize") else np.dtype(leaf.dtype).itemsize
