"""Formats x shapes x dtypes x implementations, from one table, and the error bounds that hold for all of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import jaxq
from jaxq.primitives import common

AFFINE = [jaxq.QuantSpec(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (16, 32, 64, 128)]
FLOAT = [jaxq.QuantSpec(mode=mode) for mode in ("mxfp4", "mxfp8", "nvfp4")]
SPECS = AFFINE + FLOAT
# One of each kind, for tests of a transformation rather than of a format.
FEW_SPECS = [jaxq.QuantSpec(4, 64), jaxq.QuantSpec(3, 32), jaxq.QuantSpec(mode="mxfp4"), jaxq.QuantSpec(mode="nvfp4")]
DTYPES = ["float32", "float16", "bfloat16"]
# (M, N, K): one row, tails of every tile, nothing to do.
SHAPES = [(1, 48, 128), (5, 37, 384), (17, 130, 256), (0, 32, 128), (1, 1, 128)]


def implementations() -> list[str]:
    """Every implementation that runs on this machine's CPU, the variants of each among them."""
    names = []
    for name, module in common.IMPLEMENTATIONS.items():
        if module.unavailable() is None and (module.PLATFORMS is None or "cpu" in module.PLATFORMS):
            names += [name, *(module.variants() if hasattr(module, "variants") else ())]
    return names


IMPLEMENTATIONS = implementations()


def refused(implementation: str, op: str, spec: jaxq.QuantSpec) -> str | None:
    return common.IMPLEMENTATIONS[implementation.partition(":")[0]].refuses(op, spec=spec)


@dataclasses.dataclass(frozen=True)
class Weight:
    """A random quantized weight: what jaxq holds, and its dense values in float64."""

    qw: jaxq.QuantizedArray
    dense: np.ndarray


def weight(spec: jaxq.QuantSpec, shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> Weight:
    """Random codes and scales, not a quantized random weight: every code occurs, and no quantizer is involved."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**spec.bits, shape)
    groups = (*shape[:-1], shape[-1] // spec.group_size)
    biases = None
    if spec.is_affine:
        scales = jnp.asarray(rng.uniform(0.5, 1.5, groups) / 2**spec.bits).astype(dtype)
        biases = jnp.asarray(rng.uniform(-1, 0, groups)).astype(dtype)
    elif spec.mode == "nvfp4":
        scales = jnp.asarray(rng.integers(0x28, 0x40, groups), jnp.uint8)
    else:
        scales = jnp.asarray(rng.integers(114, 122, groups), jnp.uint8)  # products stay inside float16
        codes = np.where((spec.bits == 8) & ((codes & 0x7F) == 0x7F), 0, codes)  # E4M3's NaN
    packed = jnp.asarray(oracle.pack(codes, spec.bits))
    qw = jaxq.QuantizedArray.from_packed(
        packed, scales, biases, bits=spec.bits, group_size=spec.group_size, mode=spec.mode
    )
    return Weight(qw, dense(qw))


def dense(qw: jaxq.QuantizedArray) -> np.ndarray:
    """The oracle's dense weight, in storage order."""
    biases = None if qw.biases is None else np.asarray(qw.biases)
    return oracle.dequantize(
        np.asarray(qw.packed), np.asarray(qw.scales), biases, bits=qw.bits, group_size=qw.group_size, mode=qw.mode
    )


def activations(shape: tuple[int, ...], dtype: str = "float32", seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def dequantize_bound(qw: jaxq.QuantizedArray, w: np.ndarray, dtype: str) -> np.ndarray:
    """|error| of an element: one product and one sum in float32, then one rounding to dtype.

    The product and the sum are each off by a unit roundoff of at most |scale * code| + |bias|; the last rounding by
    one of |w|, or half the least subnormal of float16.
    """
    if qw.biases is None:
        magnitude = np.abs(w)
    else:
        repeat = qw.group_size
        bias = np.repeat(np.abs(np.asarray(qw.biases, np.float64)), repeat, axis=-1)
        magnitude = np.abs(w) + 2 * bias
    return 2 * 2.0**-24 * magnitude + oracle.unit_roundoff(dtype) * np.abs(w) * (1 + 2.0**-20) + 2.0**-25


def matmul_bound(x: jax.Array, qw: jaxq.QuantizedArray, w: np.ndarray, *, transpose: bool) -> np.ndarray:
    """|error| of a product in float32 arithmetic, rounded once to x's dtype.

    A sum of n products in any order is within n * u * sum |x||w| (Higham, Accuracy and Stability, 3.1), u = 2**-24;
    dequantized weights add 2 u (|scale * code| + |bias|) <= 2 u (|w| + 2 |bias|) each; so does an implementation that
    multiplies codes and adds the biases per group. The last rounding adds one unit roundoff of |y|.
    """
    magnitude = np.abs(w)
    if qw.biases is not None:
        magnitude = magnitude + 2 * np.repeat(np.abs(np.asarray(qw.biases, np.float64)), qw.group_size, axis=-1)
    y = oracle.matmul(np.asarray(x), w, transpose=transpose)
    scale = oracle.matmul_magnitude(np.asarray(x), magnitude, transpose=transpose)
    n = x.shape[-1] + 2
    # 2**-25: half the least subnormal of float16.
    return n * 2.0**-24 * scale + oracle.unit_roundoff(x.dtype) * np.abs(y) * (1 + 2.0**-8) + 2.0**-25
