"""The safetensors container: a checked header, reads of single tensors, and an atomic writer.

A file is 8 bytes of header length, little-endian, the header in JSON, and the tensors' bytes, which fill the rest
without holes. Source: https://github.com/huggingface/safetensors, "Format". Our own reader of it because the package's
NumPy interface copies twice, and names no tensor when it refuses a file; the tests hold the two against each other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxq.checkpoints.entries import Checkpoint, Entry, dense
from jaxq.checkpoints.files import Source, atomic_file, check_shape, count, empty, parse_json, read_json, refuse

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "U32": np.uint32,
        "I32": np.int32,
        "F32": np.float32,
        "U64": np.uint64,
        "I64": np.int64,
        "F64": np.float64,
        "C64": np.complex64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The reference implementation's limit.
_HEADER_BYTES = 100_000_000
_METADATA = "__metadata__"
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor stands: `nbytes` from byte `offset` of `source` on."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    source: Source

    @property
    def nbytes(self) -> int:
        return count(self.shape) * self.dtype.itemsize

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        return dense(self.shape, self.dtype)

    @property
    def entry(self) -> Entry:
        """As it stands in the file, dense."""
        return Entry(self.struct, _NAMES[self.dtype], self.nbytes, lambda: (self.read(),))

    def read(self) -> np.ndarray:
        """The tensor, in aligned memory of its own."""
        out = empty(self.shape, self.dtype)
        self.read_rows_into(out, 0)
        return out

    def read_rows_into(self, out: np.ndarray, start: int) -> None:
        """Fill `out`, contiguous, with so many of the tensor's rows, from `start` on; reads no more than that."""
        try:
            self.source.read_into(out, self.offset + start * count(self.shape[1:]) * self.dtype.itemsize)
        except ValueError as error:
            raise refuse(self.source.path, str(error), self.name) from None


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Check a file's header against the file; no tensor is read.

    Returns:
      ({name: Tensor} in order of their bytes, the metadata).

    Raises:
      CheckpointError: anything that a well-formed file does not have, by the name of the tensor.
    """
    path = Path(path)
    source = Source(path)
    if source.size < 8:
        raise refuse(path, f"{source.size} bytes are too few for a safetensors file")
    length = int(source.read(0, 8).view(np.uint64)[0])
    if length > min(_HEADER_BYTES, source.size - 8):
        said = f"its header is said to be {length} bytes, in a file of {source.size}"
        raise refuse(path, f"{said}; truncated, or no safetensors file")
    header = parse_json(path, source.read(8, length).tobytes())
    if not isinstance(header, dict):
        raise refuse(path, "its header is no JSON object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refuse(path, "its metadata are not strings by name")
    tensors = [_tensor(source, name, fields, 8 + length) for name, fields in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_cover(source, tensors, 8 + length)
    return {tensor.name: tensor for tensor in tensors}, metadata


def _tensor(source: Source, name: str, fields: Any, data: int) -> Tensor:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise refuse(source.path, "its entry must hold dtype, shape and data_offsets, and nothing else", name)
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in DTYPES:
        raise refuse(source.path, f"dtype {str(fields['dtype'])[:100]!r}; read are {', '.join(DTYPES)}", name)
    try:
        shape = check_shape(fields["shape"])
    except ValueError as error:
        raise refuse(source.path, str(error), name) from None
    offsets = fields["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise refuse(source.path, f"data_offsets {str(offsets)[:100]} are no pair of offsets", name)
    begin, end = offsets
    if end < begin or data + end > source.size:
        there = source.size - data
        raise refuse(source.path, f"bytes {begin} to {end} lie outside the file's {there} bytes of data", name)
    tensor = Tensor(name, DTYPES[fields["dtype"]], shape, data + begin, source)
    if tensor.nbytes != end - begin:
        what = f"{fields['dtype']}{list(shape)} takes {tensor.nbytes} bytes, but {end - begin} are given to it"
        raise refuse(source.path, what, name)
    return tensor


def _check_cover(source: Source, tensors: list[Tensor], data: int) -> None:
    """The tensors, in order of their bytes, must fill the file from `data` on: no byte twice, none left over."""
    end, before = data, None
    for tensor in tensors:
        if tensor.offset < end:
            raise refuse(source.path, f"its bytes overlap those of {before!r}", tensor.name)
        if tensor.offset > end:
            raise refuse(source.path, f"{tensor.offset - end} bytes before it belong to no tensor", tensor.name)
        end, before = tensor.offset + tensor.nbytes, tensor.name
    if end != source.size:
        raise refuse(source.path, f"{source.size - end} bytes at its end belong to no tensor")


# ---- directories


def read_headers(
    path: str | os.PathLike[str], pattern: str = "*.safetensors"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one file, or of all files of a directory: those that its index names, or those like `pattern`.

    Raises:
      CheckpointError: as `read_header`; also a tensor in two files, one that the index puts elsewhere, and an index
        that names a file outside the directory.
    """
    path = Path(path)
    if not path.is_dir():
        return read_header(path)
    index = _read_index(path)
    files = sorted(set(index.values())) if index else sorted(file.name for file in path.glob(pattern))
    if not files:
        pickles = next((file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern)), None)
        also = f"; {pickles} is a pickle, which runs code when it is read: convert it elsewhere" if pickles else ""
        raise refuse(path, f"holds no {pattern}{also}")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if not (path / file).is_file():
            name = next((name for name, where in index.items() if where == file), None)
            raise refuse(path, f"stands in {file!r}, which is missing", name)
        found, more = read_header(path / file)
        metadata |= more
        for name, tensor in found.items():
            if name in tensors:
                raise refuse(path, f"stands both in {tensors[name].source.path.name!r} and in {file!r}", name)
            if index and index.get(name) != file:
                raise refuse(path, f"stands in {file!r}, but the index has it in {index.get(name)!r}", name)
            tensors[name] = tensor
    for name in index:
        if name not in tensors:
            raise refuse(path, f"is not in {index[name]!r}, where the index has it", name)
    return tensors, metadata


def _read_index(directory: Path) -> dict[str, str]:
    """tensor -> file, from `model.safetensors.index.json`; empty where there is none."""
    path = directory / INDEX
    if not path.is_file():
        return {}
    index = read_json(path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise refuse(path, "holds no weight_map")
    for name, file in names.items():
        # A plain name of a file in this very directory: no separator, no drive, no "..".
        if (
            not isinstance(file, str)
            or not re.fullmatch(r"[\w.+=@,-]{1,255}", file)
            or not file.endswith(".safetensors")
        ):
            raise refuse(path, f"{str(file)[:100]!r} is no name of a safetensors file of this directory", name)
    return names


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`config.json` of a directory, or beside a file; {} where there is none."""
    path = Path(path)
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.is_file():
        return {}
    value = read_json(config)
    if not isinstance(value, dict):
        raise refuse(config, "is no JSON object")
    return value


def open(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a safetensors file, or a Hugging Face directory of them, as it stands: every tensor dense.

    Raises:
      CheckpointError: a file that is not well-formed, by tensor name.
    """
    tensors, _ = read_headers(path)
    return Checkpoint(Path(path), "safetensors", read_config(path), {n: t.entry for n, t in tensors.items()})


# ---- writing


def write(
    path: str | os.PathLike[str],
    layout: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Iterable[tuple[str, Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file atomically, from tensors that may be made as they are written.

    Args:
      path: the file; it is replaced only once everything is on the disk.
      layout: the shape and dtype of every tensor.
      tensors: each of them once, in any order; NumPy or JAX arrays.
      metadata: strings by name, into the header.

    Raises:
      TypeError: a dtype that safetensors doesn't have.
      ValueError: tensors that are not those of `layout`.
    """
    header, offsets, data = _make_header(layout, metadata)
    with atomic_file(path) as file:
        file.write(header)
        missing = dict(layout)
        for name, tensor in tensors:
            expected = missing.pop(name, None)
            array = np.asarray(tensor)
            if expected is None or array.shape != expected.shape or array.dtype != expected.dtype:
                raise ValueError(
                    f"write: tensor {name!r} is {array.dtype}{list(array.shape)}; the layout has {expected}"
                )
            file.seek(len(header) + offsets[name])
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        if missing:
            raise ValueError(
                f"write: {len(missing)} tensors of the layout were not given, such as {next(iter(missing))!r}"
            )
        file.truncate(len(header) + data)


def _make_header(
    layout: Mapping[str, jax.ShapeDtypeStruct], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int], int]:
    """The file's first bytes, each tensor's offset in the data, and the size of the data."""
    fields: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    # The widest first, as the reference does: then each begins on a multiple of its own item size.
    for name, struct in sorted(layout.items(), key=lambda item: -item[1].dtype.itemsize):
        dtype = np.dtype(struct.dtype)
        if name == _METADATA or dtype not in _NAMES:
            raise TypeError(
                f"write: tensor {name!r} of dtype {dtype} can't stand in safetensors; use {', '.join(DTYPES)}"
            )
        begin, end = end, end + count(struct.shape) * dtype.itemsize
        fields[name] = {"dtype": _NAMES[dtype], "shape": list(struct.shape), "data_offsets": [begin, end]}
        offsets[name] = begin
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_BYTES:
        raise ValueError(f"write: a header of {len(text)} bytes; {_HEADER_BYTES} at most can be read again")
    return len(text).to_bytes(8, "little") + text, offsets, end
