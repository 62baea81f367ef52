"""GGUF files, as llama.cpp reads them: every type that is a group format loads exactly.

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0, TQ2_0 and MXFP4 keep scales of 16 (8) bits; Q2_K, Q3_K, Q4_K, Q5_K and Q6_K need
float32 scales to be exact, and Q2_K, Q3_K and Q6_K groups of 16. F32, F16, BF16, F64 and the integers load dense.
Codebook types (IQ*) and NVFP4 are refused by name, or loaded dense with `dequantize=True`, which needs the `gguf`
package. Source of the container: ggml's `docs/gguf.md`. Our own reader of it because the package's believes every count
and offset of a file, and decodes the metadata value by value.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxq.array import QuantizedArray
from jaxq.checkpoints.entries import Checkpoint, Entry, dense
from jaxq.checkpoints.files import Source, count, empty, empty_together, refuse
from jaxq.checkpoints.gguf_blocks import BLOCKS, BlockType
from jaxq.kernels import repack

# type number -> (name, weights in a block, bytes of a block). Source: `enum ggml_type` and its traits.
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip
_DENSE = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F64": np.float64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
}
_SCALARS = {
    0: np.uint8,
    1: np.int8,
    2: np.uint16,
    3: np.int16,
    4: np.uint32,
    5: np.int32,
    6: np.float32,
    7: np.bool_,
    10: np.uint64,
    11: np.int64,
    12: np.float64,
}
_STRING, _ARRAY = 8, 9
# The metadata of the largest vocabularies take 20 MB.
_METADATA_BYTES = 256 << 20
_MAX_NESTING = 8
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
# Bytes of a file that are repacked at a time: compiled, and in NumPy, whose temporaries would leave the caches, and be
# new pages each time.
_CHUNK, _NUMPY_CHUNK = 1 << 19, 1 << 15


@dataclasses.dataclass(frozen=True)
class Info:
    """A tensor of a file: `nbytes` from byte `offset` of `source` on. `shape` is NumPy's order, the rows last."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int
    source: Source


def open(path: str | os.PathLike[str], *, scale_dtype: Any = None, dequantize: bool = False) -> Checkpoint:
    """Open a GGUF file, of version 2 or 3.

    Args:
      path: the file.
      scale_dtype: float32, float16 or bfloat16 for the scales and biases of the affine types. None: per type the
        narrowest that is exact. A narrower one rounds `scales * code` and `biases` by up to 2**-11 of
        each in float16, 2**-8 in bfloat16.
      dequantize: load the types that are no group formats dense, in float32; needs the `gguf` package.

    Returns:
      A `Checkpoint` by the file's own names (`blk.0.attn_q.weight`); `config` is its metadata, with NumPy arrays for
      arrays of numbers. Shapes are NumPy's: [out, in].

    Raises:
      CheckpointError: a file that is not well-formed, by tensor name. A type that is not served is refused when it is
        read, and by `load` before anything is.
    """
    path = Path(path)
    metadata, infos = _read_header(Source(path))
    dtype = None if scale_dtype is None else np.dtype(scale_dtype)
    if dtype is not None and dtype.name not in ("float32", "float16", "bfloat16"):
        raise TypeError(f"gguf.open: scale_dtype={dtype.name}; pass float32, float16 or bfloat16, or None")
    entries = {info.name: _entry(info, dtype, dequantize) for info in infos}
    return Checkpoint(path, "gguf", metadata, entries)


# ---- the container


class _Cursor:
    """Reads the metadata of a file in order, through a window, and refuses counts that the file can't hold."""

    def __init__(self, source: Source):
        self.source, self.at = source, 0
        self._window, self._start = b"", 0
        self.end = min(source.size, _METADATA_BYTES)

    def take(self, nbytes: int, what: str) -> bytes:
        if nbytes > self.end - self.at:
            raise refuse(
                self.source.path,
                f"byte {self.at}: {what} of {nbytes} bytes runs past the end, or past {self.end} bytes",
            )
        first = self.at - self._start
        if first + nbytes > len(self._window):
            self._start, first = self.at, 0
            size = min(max(nbytes, 1 << 20), self.source.size - self.at)
            self._window = self.source.read(self.at, size).tobytes()
        self.at += nbytes
        return self._window[first : first + nbytes]

    def number(self, dtype: Any, what: str) -> Any:
        dtype = np.dtype(dtype)
        return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()

    def count(self, what: str, smallest: int) -> int:
        """A count of things that take at least `smallest` bytes each."""
        n = self.number(np.uint64, what)
        if n > (self.end - self.at) // smallest:
            raise refuse(self.source.path, f"{n} {what} can't stand in the {self.end - self.at} bytes that are left")
        return n

    def text(self, what: str, errors: str = "strict") -> str:
        data = self.take(self.count(f"characters of {what}", 1), what)
        try:
            return data.decode("utf-8", errors)
        except UnicodeDecodeError:
            raise refuse(self.source.path, f"{what} {data[:100]!r} is no UTF-8") from None

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        """A value of a metadata type: a number, a string, a NumPy array of numbers, or a list of the other ones."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], f"the value of {key!r}")
        if kind == _STRING:
            return self.text(f"the value of {key!r}", "surrogateescape")  # tokens are bytes, UTF-8 or not
        if kind != _ARRAY or depth == _MAX_NESTING:
            raise refuse(self.source.path, f"the metadata {key!r} have type {kind}, or are nested deeper than is read")
        inner = self.number(np.uint32, f"the type of {key!r}")
        if inner in _SCALARS:
            dtype = np.dtype(_SCALARS[inner])
            n = self.count(f"elements of {key!r}", dtype.itemsize)
            return np.frombuffer(self.take(n * dtype.itemsize, key), dtype)
        return [self.value(inner, key, depth + 1) for _ in range(self.count(f"elements of {key!r}", 8))]


def _read_header(source: Source) -> tuple[dict[str, Any], list[Info]]:
    cursor, path = _Cursor(source), source.path
    if source.size < 24 or cursor.take(4, "magic") != b"GGUF":
        raise refuse(path, "does not begin as a GGUF file does")
    version = cursor.number(np.uint32, "version")
    if version not in (2, 3):
        raise refuse(path, f"GGUF version {version}; 2 and 3 are read, of little-endian files")
    tensors = cursor.count("tensors", 24)
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count("metadata", 13)):
        key = cursor.text("a key of the metadata")
        if key in metadata:
            raise refuse(path, f"the metadata {key!r} stand there twice")
        metadata[key] = cursor.value(cursor.number(np.uint32, f"the type of {key!r}"), key)
    raw = [_read_info(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & alignment - 1:
        raise refuse(path, f"general.alignment is {str(alignment)[:100]}, no power of two")
    data = -(-cursor.at // alignment) * alignment
    infos = [_check_info(source, data, alignment, *fields) for fields in raw]
    _check_disjoint(path, infos)
    return metadata, infos


def _read_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """A tensor's name, shape, type and offset, unchecked."""
    name = cursor.text("a tensor's name")
    rank = cursor.number(np.uint32, "a rank")
    if rank > _MAX_DIMENSIONS:
        raise refuse(cursor.source.path, f"{rank} dimensions; GGUF has {_MAX_DIMENSIONS} at most", name)
    lengths = np.frombuffer(cursor.take(8 * rank, f"the shape of {name!r}"), np.uint64).tolist()
    kind = cursor.number(np.uint32, f"the type of {name!r}")
    return name, tuple(reversed(lengths)), kind, cursor.number(np.uint64, f"the offset of {name!r}")


def _check_info(
    source: Source, data: int, alignment: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> Info:
    if kind not in _TYPES:
        raise refuse(source.path, f"type number {kind} is unknown; its size in the file can't be told", name)
    type_name, block, block_bytes = _TYPES[kind]
    if (shape[-1] if shape else 1) % block:
        raise refuse(source.path, f"rows of {shape[-1]} are no whole blocks of {block} ({type_name})", name)
    nbytes = count(shape) // block * block_bytes
    if offset % alignment:
        raise refuse(source.path, f"offset {offset} is no multiple of the alignment, {alignment}", name)
    if data + offset + nbytes > source.size:
        what = f"{type_name}{list(shape)} takes bytes {data + offset} to {data + offset + nbytes}"
        raise refuse(source.path, f"{what} of a file of {source.size}; truncated?", name)
    return Info(name, shape, type_name, data + offset, nbytes, source)


def _check_disjoint(path: Path, infos: Sequence[Info]) -> None:
    names: set[str] = set()
    end, before = 0, ""
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        if info.name in names:
            raise refuse(path, "stands there twice", info.name)
        if info.offset < end:
            raise refuse(path, f"its bytes overlap those of {before!r}", info.name)
        names.add(info.name)
        end, before = info.offset + info.nbytes, info.name


# ---- tensors


def _entry(info: Info, scale_dtype: np.dtype | None, dequantize: bool) -> Entry:
    if info.type in _DENSE:
        plain = dense(info.shape, _DENSE[info.type])
        return Entry(plain, info.type, info.nbytes, lambda: (_read_dense(info, plain),))
    block = BLOCKS.get(info.type)
    if block is not None and len(info.shape) >= 2:
        dtype = np.dtype(scale_dtype if scale_dtype is not None and block.spec.is_affine else block.scale_dtype)
        abstract = _abstract(info.shape, block, dtype)
        return Entry(abstract, info.type, info.nbytes, lambda: _read_blocks(info, block, abstract))
    as_floats = dense(info.shape, np.float32)
    if dequantize:
        return Entry(as_floats, info.type, info.nbytes, lambda: (_read_by_package(info),))
    why = "a vector of blocks" if block is not None else f"{info.type}, which is no group format"
    return Entry(as_floats, info.type, info.nbytes, lambda: (), f"is {why}; pass dequantize=True to load it dense")


def _abstract(shape: tuple[int, ...], block: BlockType, dtype: np.dtype) -> QuantizedArray:
    spec = block.spec
    *lead, length = shape
    scales = dense((*lead, spec.groups(length)), dtype)
    biases = scales if spec.is_affine else None
    packed = dense((*lead, spec.words(length)), np.uint32)
    return QuantizedArray.from_packed(
        packed, scales, biases, bits=spec.bits, group_size=spec.group_size, mode=spec.mode
    )


def _read_dense(info: Info, abstract: jax.ShapeDtypeStruct) -> np.ndarray:
    return info.source.read(info.offset, info.nbytes).view(abstract.dtype).reshape(info.shape)


def _read_blocks(info: Info, block: BlockType, abstract: QuantizedArray) -> list[np.ndarray]:
    """packed, scales and biases, a few blocks at a time, so that nothing beside them is ever whole in memory."""
    leaves = empty_together(abstract.leaves)
    # A row is whole blocks, so the blocks of all rows are one long row.
    flat = [leaf.reshape(-1) for leaf in leaves]
    if not (_repack_compiled if repack.available() else _repack_numpy)(info, block, flat):
        what = "its scales or biases are beyond float16; pass scale_dtype=float32"
        raise refuse(info.source.path, what, info.name)
    return leaves


def _repack_compiled(info: Info, block: BlockType, leaves: list[np.ndarray]) -> bool:
    done, fits = repack.file_blocks(
        info.type,
        info.source.descriptor,
        info.offset,
        leaves,
        nbytes=block.nbytes,
        weights=block.block,
        spec=block.spec,
        batch=max(_CHUNK // block.nbytes, 1),
    )
    info.source.check_read(info.offset, done * block.nbytes, info.nbytes, info.name)
    return fits


def _repack_numpy(info: Info, block: BlockType, leaves: list[np.ndarray]) -> bool:
    each = [block.spec.words(block.block), *[block.spec.groups(block.block)] * (len(leaves) - 1)]
    fits = True
    for start, blocks in _chunks(info, block.nbytes, _NUMPY_CHUNK):
        stop = start + len(blocks)
        fits &= block.repack(blocks, [leaf[start * n : stop * n] for leaf, n in zip(leaves, each, strict=True)])
    return fits


def _chunks(info: Info, block_bytes: int, chunk: int) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the first block, uint8[n, block_bytes], until the next one is asked for) over a tensor."""
    total, step = info.nbytes // block_bytes, max(chunk // block_bytes, 1)
    buffer = empty((min(step, total), block_bytes), np.uint8)
    for start in range(0, total, step):
        blocks = buffer[: total - start]
        info.source.read_into(blocks, info.offset + start * block_bytes)
        yield start, blocks


def _read_by_package(info: Info) -> np.ndarray:
    """float32, dequantized by the `gguf` package."""
    try:
        import gguf
    except ImportError:
        what = f"is {info.type}, which only the gguf package dequantizes: pip install 'jaxq[checkpoints]'"
        raise refuse(info.source.path, what, info.name) from None
    kind = gguf.GGMLQuantizationType[info.type]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    out = empty(info.shape, np.float32)
    flat = out.reshape(-1)
    try:
        for start, blocks in _chunks(info, block_bytes, _NUMPY_CHUNK):
            flat[start * block : (start + len(blocks)) * block] = gguf.dequantize(blocks, kind).reshape(-1)
    except NotImplementedError as error:
        raise refuse(info.source.path, f"is {info.type}: {error}", info.name) from None
    return out
