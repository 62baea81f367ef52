"""Calls the CPU kernels through XLA's FFI, one layer below jaxq's primitives, and makes and decodes packed weights.

Nothing of jaxq is used but the library's handlers: the decoder here is the tests' own, in NumPy float64.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxq import kernels

FORMATS = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (16, 32, 64, 128)]
FORMATS += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


@functools.cache
def library():
    """The library, with its handlers registered under names of these tests' own."""
    lib = kernels.cpu_library()
    for name in kernels.CPU_HANDLERS:
        jax.ffi.register_ffi_target("test_" + name, jax.ffi.pycapsule(getattr(lib, name)), platform="cpu")
    return lib


def usable_isas() -> list[str]:
    return [name for name, missing in kernels.isas(kernels.cpu_library()).items() if missing is None]


def call(op: str, results, *operands, mode: str, bits: int, group: int, isa: str = "", **attributes):
    """`op` on NumPy or JAX arrays; `results` are shapes with dtypes, one or a tuple."""
    library()
    return jax.ffi.ffi_call(f"test_jaxq_{op}_cpu", results)(
        *operands, mode=mode, bits=np.int64(bits), group_size=np.int64(group), isa=isa, **attributes
    )


def matmul(x, weight, fmt, transpose: bool = True, isa: str = ""):
    """x by `weight`, a tuple (packed, scales[, biases])."""
    mode, bits, group = fmt
    packed, scales = weight[:2]
    outer = packed.shape[-2] if transpose else scales.shape[-1] * group
    result = jax.ShapeDtypeStruct((*x.shape[:-1], outer), x.dtype)
    return call("quantized_matmul", result, x, *weight, mode=mode, bits=bits, group=group, isa=isa, transpose=transpose)


def dequantize(weight, fmt, dtype, isa: str = ""):
    mode, bits, group = fmt
    packed, scales = weight[:2]
    result = jax.ShapeDtypeStruct((*packed.shape[:-1], scales.shape[-1] * group), dtype)
    return call("dequantize", result, *weight, mode=mode, bits=bits, group=group, isa=isa)


def quantize(w, fmt, isa: str = ""):
    mode, bits, group = fmt
    *lead, length = w.shape
    scale = jax.ShapeDtypeStruct((*lead, length // group), w.dtype if mode == "affine" else jnp.uint8)
    results = (jax.ShapeDtypeStruct((*lead, length * bits // 32), jnp.uint32), scale)
    results += (scale,) if mode == "affine" else ()
    return call("quantize", results, w, mode=mode, bits=bits, group=group, isa=isa)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [..., L] -> uint32[..., L*bits/32], a little-endian bit stream."""
    stream = (codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    flat = stream.reshape(*codes.shape[:-1], codes.shape[-1] * bits)
    return np.ascontiguousarray(np.packbits(flat, axis=-1, bitorder="little")).view(np.uint32)


def random_weight(rng, fmt, shape, scale_dtype=np.float32, code: int | None = None):
    """A weight of random codes, or of one, in the packed form, and its exact float64 values."""
    mode, bits, group = fmt
    codes = rng.integers(0, 2**bits, shape) if code is None else np.full(shape, code)
    grouped = (*shape[:-1], shape[-1] // group)
    if mode == "affine":
        scales = (rng.uniform(0.5, 1.5, grouped) / 2**bits).astype(scale_dtype)
        biases = (-scales.astype(np.float64) * (2**bits - 1) / 2 * rng.uniform(0.8, 1.2, grouped)).astype(scale_dtype)
        arrays = (pack(codes, bits), scales, biases)
        values, scale, bias = codes, scales.astype(np.float64), biases.astype(np.float64)
    else:
        if mode == "mxfp8":
            codes = np.where(codes % 128 == 127, codes - 1, codes)  # no NaN
        scale_type = ml_dtypes.float8_e4m3fn if mode == "nvfp4" else ml_dtypes.float8_e8m0fnu
        scales = rng.integers(40, 72, grouped) if mode == "nvfp4" else rng.integers(118, 130, grouped)
        scales = scales.astype(np.uint8)
        code_type = ml_dtypes.float8_e4m3fn if mode == "mxfp8" else ml_dtypes.float4_e2m1fn
        values = codes.astype(np.uint8).view(code_type).astype(np.float64)
        arrays = (pack(codes, bits), scales)
        scale, bias = scales.view(scale_type).astype(np.float64), np.zeros(grouped)
    dense = np.repeat(scale, group, -1) * values + np.repeat(bias, group, -1)
    return arrays, dense
