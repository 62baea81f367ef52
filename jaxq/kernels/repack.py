"""Repacking the words of checkpoints with the CPU kernels' library, where it was built.

They make the same bits as the NumPy code of `jaxq/checkpoints` that they stand in for. The library trusts what it is
given, so every size is checked here, whatever the caller has checked.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from typing import Literal

import ml_dtypes
import numpy as np

from jaxq import kernels
from jaxq.spec import QuantSpec

Order = Literal["gptq", "awq"]

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
# name -> (result, arguments)
_FUNCTIONS = {
    "blocks": (_INT, [_INT, ctypes.c_char_p, *[_INT] * 4, _POINTER, _SIZE, *[_POINTER] * 3, _INT]),
    "file_blocks": (
        _SIZE,
        [_INT, ctypes.c_char_p, *[_INT] * 5, *[_SIZE] * 3, *[_POINTER] * 3, _INT, ctypes.POINTER(_INT)],
    ),
    "file_words": (_SIZE, [*[_INT] * 3, *[_SIZE] * 4, _POINTER, _SIZE]),
    "transpose": (None, [_INT, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE]),
    "awq": (None, [_INT, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE]),
    "groups": (_INT, [_INT, _POINTER, _INT, _POINTER, *[_INT] * 3, *[_SIZE] * 3, _POINTER, _POINTER, _SIZE, _INT]),
}
_FLOATS = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}
_DTYPES = _FLOATS | {np.dtype(np.uint8): 3}


@functools.cache
def _library_or_reason() -> ctypes.CDLL | str:
    try:
        library = kernels.cpu_library()
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, f"jaxq_repack_{name}")
            function.restype, function.argtypes = result, arguments
    except kernels.KernelsUnavailable as error:
        return str(error)
    except AttributeError as error:
        return f"the CPU kernels are of an older version ({error}); build them anew: python -m jaxq.kernels.cpu.build"
    return library


def why_unavailable() -> str | None:
    """Why the library is not there, or can't be used, and what would help; None where it can."""
    found = _library_or_reason()
    return found if isinstance(found, str) else None


def available() -> bool:
    """Whether the library is there. Without it, the functions below can't be called."""
    return why_unavailable() is None


def blocks(
    type: str,
    blocks: np.ndarray,
    leaves: Sequence[np.ndarray],
    *,
    weights: int,
    spec: QuantSpec,
    skip: int = 0,
) -> bool:
    """Repack blocks of a GGUF type.

    Args:
      type: its name, such as `Q4_K`.
      blocks: uint8[n, bytes of a block].
      leaves: what is filled: packed uint32[n * words of a block]; scales and, in mode affine, biases
        [n * groups of a block], float32, float16 or bfloat16, or uint8 scales in a float mode.
      weights: in a block.
      spec: the format of `leaves`.
      skip: of the instruction sets that this CPU has, how many of the best are not used; for tests.

    Returns:
      Whether every finite scale and bias is finite in float16, where that is their dtype.
    """
    _check(blocks, (len(blocks), blocks.shape[-1]), np.uint8)
    form, out = _block_arguments(type, blocks.shape[-1], len(blocks), leaves, weights, spec)
    return _fits(_call("blocks", skip, *form, blocks.ctypes.data, len(blocks), *out), form)


def file_blocks(
    type: str,
    file: int,
    offset: int,
    leaves: Sequence[np.ndarray],
    *,
    nbytes: int,
    weights: int,
    spec: QuantSpec,
    batch: int,
    skip: int = 0,
) -> tuple[int, bool]:
    """`blocks` of a file, as many as fill `leaves`, in one call that holds no lock of Python's.

    Args:
      file: its descriptor.
      offset: where the blocks begin.
      nbytes: of a block.
      batch: so many blocks are read at a time.

    Returns:
      How many blocks were repacked, fewer where the file ends before; and what `blocks` returns.

    Raises:
      OSError: the file can't be read.
    """
    n = leaves[0].size // spec.words(weights)
    form, out = _block_arguments(type, nbytes, n, leaves, weights, spec)
    outcome = _INT()
    done = _call("file_blocks", skip, *form, file, offset, n, _batch(batch), *out, ctypes.byref(outcome))
    return _done(done), _fits(outcome.value, form)


def _block_arguments(
    type: str, nbytes: int, n: int, leaves: Sequence[np.ndarray], weights: int, spec: QuantSpec
) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """What the library takes for a type and its sizes, and for the leaves of n blocks of it."""
    _check(leaves[0], (n * spec.words(weights),), np.uint32)
    for leaf in leaves[1:]:
        _check(leaf, (n * spec.groups(weights),), leaves[1].dtype)
    if len(leaves) != (3 if spec.is_affine else 2) or (leaves[1].dtype == np.uint8) == spec.is_affine:
        raise ValueError(f"blocks: {len(leaves)} leaves, scales of {leaves[1].dtype}, for {spec}")
    addresses = [leaf.ctypes.data for leaf in leaves] + [None] * (3 - len(leaves))
    return (type.encode(), nbytes, weights, spec.bits, spec.group_size), (*addresses, _DTYPES[leaves[1].dtype])


def _fits(outcome: int, form: Sequence[object]) -> bool:
    if outcome < 0:
        raise ValueError(f"blocks: type={form[0]!r} of blocks of {form[1]} bytes, {form[2]} weights, is not known")
    return outcome == 0


def transpose(words: np.ndarray, out: np.ndarray, *, skip: int = 0) -> None:
    """`out[...] = words.T` of 32-bit items: words [R, C], out [C, R], a slice of columns of a larger array or not."""
    _check(words, words.shape, words.dtype)
    if words.itemsize != 4:
        raise ValueError(f"transpose: items of {words.dtype}; 4 bytes are due")
    _call("transpose", skip, words.ctypes.data, *words.shape, *_target(out, words.shape[::-1]))


def awq(words: np.ndarray, out: np.ndarray, *, skip: int = 0) -> None:
    """AWQ's words int32[K, C] of eight outputs each, to ours, uint32[8 * C, K / 8] of eight inputs each."""
    inputs, columns = words.shape
    _check(words, words.shape, np.int32)
    if inputs % 8:
        raise ValueError(f"awq: {inputs} inputs are no multiple of 8")
    _call("awq", skip, words.ctypes.data, inputs // 8, columns, *_target(out, (8 * columns, inputs // 8)))


def file_words(
    order: Order, file: int, offset: int, shape: tuple[int, int], out: np.ndarray, *, batch: int, skip: int = 0
) -> int:
    """`transpose` ("gptq") or `awq` of int32[shape] in a file, in one call that holds no lock of Python's.

    Args:
      file: its descriptor.
      offset: where the words begin.
      out: as theirs.
      batch: so many rows are read at a time, a multiple of 8.

    Returns:
      How many rows were repacked, fewer where the file ends before.

    Raises:
      OSError: the file can't be read.
    """
    rows, columns = shape
    if batch % 8 or (order == "awq" and rows % 8):
        raise ValueError(f"file_words: {rows} rows, {batch} at a time, are no multiple of 8")
    due = (8 * columns, rows // 8) if order == "awq" else (columns, rows)
    target = _target(out, due)
    return _done(_call("file_words", skip, int(order == "awq"), file, offset, *shape, _batch(batch), *target))


def groups(
    scales: np.ndarray,
    zeros: np.ndarray,
    out: Sequence[np.ndarray],
    *,
    bits: int,
    order: Order,
    less: int,
    repeats: int,
    skip: int = 0,
) -> Literal["exact", "rounded", "beyond"]:
    """Scales and zero points of GPTQ and AWQ to scales and biases, `-scales * zeros`.

    Args:
      scales: float32, float16 or bfloat16 [G, N].
      zeros: 32-bit words [G, N * bits / 32].
      out: scales and biases that are filled, [N, S] of one of these dtypes; S is at most G * repeats.
      bits: of a zero point: 2, 3, 4 or 8.
      order: of those in a word; "awq" has 4 bits.
      less: what is stored is so much less than the zero point, modulo 2**bits.
      repeats: how many groups of ours one of theirs makes; the last one may make fewer.
      skip: of the instruction sets that this CPU has, how many of the best are not used; for tests.

    Returns:
      Whether finite scales and biases are, in the dtype of `out`, the same; or rounded; or some infinite.
    """
    count, outputs = scales.shape
    row, words = out[0].shape[-1], outputs * bits // 32
    _check(scales, (count, outputs), scales.dtype)
    _check(zeros, (count, words), zeros.dtype)
    for leaf in out:
        _check(leaf, (outputs, row), out[0].dtype)
    dtypes = [_FLOATS.get(array.dtype) for array in (scales, out[0])]
    fits = words * 32 == outputs * bits and (count - 1) * repeats < row <= count * repeats and len(out) == 2
    if None in dtypes or zeros.itemsize != 4 or bits not in ((4,) if order == "awq" else (2, 3, 4, 8)) or not fits:
        what = f"{scales.dtype}{list(scales.shape)}, zeros {zeros.dtype}{list(zeros.shape)} of {bits} bits"
        raise ValueError(f"groups: scales {what}, {repeats=}, make no {out[0].dtype}{list(out[0].shape)}")
    sizes = bits, int(order == "awq"), less, count, outputs, repeats
    addresses = scales.ctypes.data, dtypes[0], zeros.ctypes.data
    lost = _call("groups", skip, *addresses, *sizes, out[0].ctypes.data, out[1].ctypes.data, row, dtypes[1])
    return "beyond" if lost & 1 else "rounded" if lost & 2 else "exact"


def _call(name: str, skip: int, *arguments: object) -> int:
    return getattr(_library_or_reason(), f"jaxq_repack_{name}")(skip, *arguments)


def _batch(batch: int) -> int:
    if batch < 1:
        raise ValueError(f"repack: batch={batch}; 1 at least is due")
    return batch


def _done(done: int) -> int:
    if done < 0:
        raise OSError(-done, os.strerror(-done))
    return done


def _check(array: np.ndarray, shape: tuple[int, ...], dtype: np.dtype | type) -> None:
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        what = f"{array.dtype}{list(array.shape)} with strides {array.strides}"
        raise ValueError(f"repack: {what}, where contiguous {np.dtype(dtype)}{list(shape)} is due")


def _target(out: np.ndarray, shape: tuple[int, ...]) -> tuple[int, int]:
    """The address of an array of 32-bit items and its rows' distance, in items."""
    if out.shape != shape or out.itemsize != 4 or out.strides[1] != 4 or out.strides[0] % 4 or out.strides[0] < 0:
        raise ValueError(f"repack: out is {out.dtype}{list(out.shape)} with strides {out.strides}; {shape} is due")
    return out.ctypes.data, out.strides[0] // 4
