"""What the tests of readers and writers share."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np

# Every format that MLX can write, as mx.quantize's arguments.
MLX_FORMATS = [
    {"bits": bits, "group_size": group_size, "mode": "affine"}
    for bits in (2, 3, 4, 5, 6, 8)
    for group_size in (32, 64, 128)
] + [
    {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    {"bits": 4, "group_size": 16, "mode": "nvfp4"},
]


def same_bits(a, b) -> bool:
    """Whether two arrays are the same in dtype, shape and every bit."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def raw_safetensors(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file by hand, well-formed or not; `length` in place of the header's true one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def codes_of(qw) -> np.ndarray:
    """The codes, uint8[..., K], bit by bit."""
    packed = np.asarray(qw.packed)
    bits = np.unpackbits(packed.view(np.uint8), axis=-1, bitorder="little").reshape(*packed.shape[:-1], -1, qw.bits)
    return (bits << np.arange(qw.bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


def dense(qw) -> np.ndarray:
    """float32[..., K]: a weight of mode affine or mxfp4 by its definition, in NumPy."""
    codes = codes_of(qw)
    scales = np.repeat(np.asarray(qw.scales), qw.group_size, axis=-1)
    if qw.spec.is_affine:
        biases = np.repeat(np.asarray(qw.biases), qw.group_size, axis=-1)
        return scales.astype(np.float32) * codes + biases.astype(np.float32)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return values * scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
