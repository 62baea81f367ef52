"""The arithmetic of quantized weights in NumPy float64. Imports nothing of jaxq, so that nothing can be wrong in both.

Formats: mlx.core's affine format; OCP Microscaling Formats v1.0 for E2M1, E4M3 and E8M0.
"""

from __future__ import annotations

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([E2M1, -E2M1])


def e4m3(byte: np.ndarray) -> np.ndarray:
    """E4M3 bytes as float64; the two NaN encodings as NaN."""
    byte = byte.astype(np.int64)
    sign = np.where(byte & 0x80, -1.0, 1.0)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    return sign * np.where((byte & 0x7F) == 0x7F, np.nan, value)


def e8m0(byte: np.ndarray) -> np.ndarray:
    """E8M0 bytes as float64; 0xFF is NaN."""
    return np.where(byte == 0xFF, np.nan, 2.0 ** (byte.astype(np.float64) - 127))


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint32[..., W] -> codes[..., W * 32 / bits], by way of single bits."""
    words = np.ascontiguousarray(packed, dtype="<u4")
    stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    codes = stream.reshape(*stream.shape[:-1], -1, bits).astype(np.int64)
    return (codes << np.arange(bits)).sum(-1)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `unpack`."""
    stream = (codes[..., None].astype(np.int64) >> np.arange(bits)) & 1
    stream = stream.reshape(*codes.shape[:-1], -1).astype(np.uint8)
    return np.packbits(stream, axis=-1, bitorder="little").view("<u4").astype(np.uint32)


def dequantize(
    packed: np.ndarray, scales: np.ndarray, biases: np.ndarray | None, *, bits: int, group_size: int, mode: str
) -> np.ndarray:
    """float64[..., K], exact: every product and sum of these formats fits float64."""
    codes = unpack(np.asarray(packed), bits)
    groups = codes.reshape(*codes.shape[:-1], -1, group_size)
    if mode == "affine":
        w = np.asarray(scales, np.float64)[..., None] * groups + np.asarray(biases, np.float64)[..., None]
    else:
        value = e4m3(groups) if bits == 8 else E2M1[groups]
        scale = e4m3(np.asarray(scales)) if mode == "nvfp4" else e8m0(np.asarray(scales))
        w = value * scale[..., None]
    return w.reshape(codes.shape)


def matmul(x: np.ndarray, w: np.ndarray, *, transpose: bool) -> np.ndarray:
    """float64: x[..., M, K] by w[..., N, K] -> [..., M, N]; x[..., M, N] -> [..., M, K] where not transpose."""
    w = np.swapaxes(w, -1, -2) if transpose else w
    return np.matmul(np.asarray(x, np.float64), w)


def matmul_magnitude(x: np.ndarray, w: np.ndarray, *, transpose: bool) -> np.ndarray:
    """What a product's rounding errors are proportional to: |x| @ |w|."""
    return matmul(np.abs(np.asarray(x, np.float64)), np.abs(w), transpose=transpose)


def unit_roundoff(dtype: np.dtype | str) -> float:
    """Half the distance from 1 to the next number: the largest relative error of one rounding."""
    return {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[np.dtype(dtype).name]
