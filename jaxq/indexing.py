"""NumPy indexing of a `QuantizedArray`."""

from __future__ import annotations

import functools
from types import EllipsisType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.array import QuantizedArray, from_storage, storage_order

Index = int | slice | EllipsisType | Any  # Any: an array or a list of ints; or a tuple of all these


def take(qw: QuantizedArray, ids: Any, dtype: Any = None) -> jax.Array:
    """See `QuantizedArray.take`."""
    rows = _axis_of_rows(qw)
    if isinstance(ids, slice | EllipsisType | tuple) or ids is None:
        raise TypeError(f"take: ids={ids!r}; pass an int or an array of ints")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"take: dtype={jnp.dtype(dtype).name}; pass a floating-point dtype")
    index = [slice(None)] * qw.ndim
    index[rows] = ids
    return cast(jax.Array, getitem(qw, tuple(index), dtype))


def getitem(qw: QuantizedArray, index: Index, dtype: Any = None) -> QuantizedArray | jax.Array:
    """See `QuantizedArray.__getitem__`. Out-of-range ints in arrays clamp, as in `jax.numpy`.

    `dtype` is that of dense rows; None: that of the scales.
    """
    entries = _expand(qw, index)
    grouped = qw.ndim + qw.axis[-1]
    if not _is_full(entries[grouped], qw.shape[grouped]):
        raise IndexError(
            f"QuantizedArray: axis {grouped} of shape {qw.shape} is grouped and can't be indexed; "
            "call .dequantize() first"
        )
    arrays = [i for i, entry in enumerate(entries) if not isinstance(entry, int | slice)]
    if len(arrays) > 1 or (arrays and any(isinstance(entry, int) for entry in entries)):
        raise IndexError("QuantizedArray: one array of ints at a time, and no int beside it; index in two steps")
    return _take(qw, entries, grouped, dtype)


def _expand(qw: QuantizedArray, index: Index) -> list[Any]:
    """One entry per logical axis: an int in range, a slice or an array of ints."""
    entries = list(index) if isinstance(index, tuple) else [index]
    ellipses = [i for i, entry in enumerate(entries) if entry is Ellipsis]
    if any(entry is None for entry in entries) or len(ellipses) > 1:
        raise IndexError("QuantizedArray: None and more than one Ellipsis are not supported in an index")
    missing = qw.ndim - (len(entries) - len(ellipses))
    if missing < 0:
        raise IndexError(f"QuantizedArray: {len(entries)} indices for shape {qw.shape}")
    at = ellipses[0] if ellipses else len(entries)
    entries[at : at + len(ellipses)] = [slice(None)] * missing
    return [_normalize(entry, axis, size) for axis, (entry, size) in enumerate(zip(entries, qw.shape, strict=True))]


def _normalize(entry: Any, axis: int, size: int) -> Any:
    if isinstance(entry, slice):
        return entry
    if isinstance(entry, int | np.integer) and not isinstance(entry, bool):
        if not -size <= entry < size:
            raise IndexError(f"QuantizedArray: index {entry} is out of range for axis {axis} of length {size}")
        return int(entry) % size if size else int(entry)
    array = jnp.asarray(entry)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise IndexError(f"QuantizedArray: axis {axis} is indexed by {array.dtype.name}; pass ints or slices")
    return array


def _is_full(entry: Any, size: int) -> bool:
    return isinstance(entry, slice) and entry.indices(size) == (0, size, 1)


def _take(qw: QuantizedArray, entries: list[Any], grouped: int, dtype: Any) -> QuantizedArray | jax.Array:
    order = storage_order(qw.ndim, qw.axis)
    storage: list[Any] = [slice(None)] * qw.ndim
    for axis, entry in enumerate(entries):
        storage[order[axis]] = slice(None) if axis == grouped else entry
    if qw.spec.held_by is not None and not all(_is_full(storage[a], qw.storage_shape[a]) for a in (-2, -1)):
        raise IndexError(
            f"QuantizedArray: rows of a weight that is held by {qw.spec.held_by} can't be indexed, only leading axes"
        )
    leaves = [_pick(leaf, storage) for leaf in qw.leaves]
    result = type(qw)(*leaves, spec=qw.spec, axis=-1)

    # What became of each axis, in logical order: the axes that remain, with the grouped one among them.
    remaining = [_rank(entry) for entry in entries]
    before, after = sum(remaining[:grouped]), sum(remaining[grouped + 1 :])
    rows = _axis_of_rows(qw)
    if len(qw.axis) > 1 and any(not _is_full(entries[qw.ndim + a], qw.shape[qw.ndim + a]) for a in qw.axis):
        raise IndexError(f"QuantizedArray: axes {qw.axis} are contracted together; index the others alone")
    if isinstance(entries[rows], slice):
        # Axes are counted from the end, so those of `axis` keep their numbers where only axes before them vanish.
        shift = {a: sum(1 - r for r in remaining[qw.ndim + a :]) for a in qw.axis}
        return type(qw)(*leaves, spec=qw.spec, axis=tuple(a + shift[a] for a in qw.axis))
    if len(qw.axis) > 1:
        raise IndexError(f"QuantizedArray: rows under several contracted axes {qw.axis} can't be looked up")
    dense = result.dequantize(qw.float_dtype if dtype is None else dtype)
    return from_storage(dense, (-1 - after,)) if before + after == dense.ndim - 1 else dense


def _pick(leaf: jax.Array, storage: list[Any]) -> jax.Array:
    """`leaf[*storage]`; of a leaf of 16 bits without a pass over all of it."""
    axis = next((i for i, entry in enumerate(storage) if not isinstance(entry, int | slice)), None)
    if axis is None or leaf.dtype.itemsize != 2:
        return leaf[tuple(storage)]
    ids, storage = storage[axis], [*storage[:axis], slice(None), *storage[axis + 1 :]]
    whole = all(map(_is_full, storage, leaf.shape))
    return _pick_halves(axis, leaf if whole else leaf[tuple(storage)], ids)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _pick_halves(axis: int, leaf: jax.Array, ids: jax.Array) -> jax.Array:
    """Along an axis, as the bits they are: for a gather of bfloat16 or float16 XLA on CPUs converts the whole array.

    The barrier ties the array to the ids. Without it XLA takes the bits of the whole, a copy, ahead of a loop.
    """
    leaf, ids = lax.optimization_barrier((leaf, ids))
    bits = lax.bitcast_convert_type(leaf, jnp.uint16)
    return lax.bitcast_convert_type(bits[(slice(None),) * axis + (ids,)], leaf.dtype)


@_pick_halves.defjvp
def _pick_halves_jvp(axis: int, primals: Any, tangents: Any) -> Any:
    return _pick_halves(axis, *primals), tangents[0][(slice(None),) * axis + (primals[1],)]


def _axis_of_rows(qw: QuantizedArray) -> int:
    """The last logical axis that is not grouped."""
    return next(axis for axis in reversed(range(qw.ndim)) if axis - qw.ndim not in qw.axis)


def _rank(entry: Any) -> int:
    """How many axes an index leaves in the place of one."""
    return 1 if isinstance(entry, slice) else 0 if isinstance(entry, int) else entry.ndim
