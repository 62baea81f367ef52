"""`xla`: plain array operations, the definition that every other implementation must match.

No custom call, no sub-byte dtype, no float8: the same text lowers for CPU, GPU, TPU, METAL and platforms unknown to us.

Two habits of XLA's simplifier would break bit-identity with `mlx.core.quantize`, and `_divide` and `_round_to` hold
them off:
  - `a / broadcast(b)` and `a / constant` become multiplications by a reciprocal, which is not the correctly rounded
    quotient; with bf16 weights, whose quotients often lie exactly between two codes, that moves 0.5% of the codes;
  - a value that is rounded to a narrow dtype and widened again keeps its excess precision.
XLA flushes denormal float32 values to zero, so weights, scales and float-mode groups below 2**-126 read as zeros.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import packing
from jaxq.spec import QuantSpec

NAME = "xla"
PLATFORMS = None  # every one

# |value| of the E2M1 codes 0..7; codes 8..15 are their negatives. OCP Microscaling Formats v1.0, section 5.3.3.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E4M3_MAX = 448.0
_NAN_E8M0 = 0xFF
_NAN_E4M3 = 0x7F


def unavailable() -> str | None:
    return None


def refuses(op: str, *, spec: QuantSpec) -> str | None:
    return None


def quantize(w: jax.Array, *, spec: QuantSpec) -> list[jax.Array]:
    """w: float[..., N, K] -> packed uint32[..., N, W], scales[..., N, G] and, in mode affine, biases[..., N, G].

    A group with a NaN or an infinity gets scales that are NaN, so that all of it dequantizes to NaN.
    """
    groups = w.astype(jnp.float32).reshape(spec.grouped(w.shape))
    codes, *params = _quantize_affine(groups, spec) if spec.is_affine else _quantize_float(groups, spec, w.dtype)
    packed = packing.pack(codes.reshape(w.shape), spec.bits)
    return [packed, *(p[..., 0].astype(spec.scale_dtype(w.dtype)) for p in params)]


def dequantize(
    packed: jax.Array, scales: jax.Array, biases: jax.Array | None = None, *, spec: QuantSpec, dtype: np.dtype
) -> jax.Array:
    """packed uint32[..., N, W], scales and biases [..., N, G] -> dtype[..., N, K]; in float32, rounded once."""
    return _dense(packed, scales, biases, spec).astype(dtype)


def quantized_matmul(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    biases: jax.Array | None = None,
    *,
    spec: QuantSpec,
    transpose: bool,
) -> jax.Array:
    """x[B..., M, K] by w[B..., N, K] -> x.dtype[B..., M, N], or x[B..., M, N] -> [B..., M, K] where not `transpose`."""
    w = _dense(packed, scales, biases, spec)
    batch = tuple(range(w.ndim - 2))
    contract = w.ndim - 1 if transpose else w.ndim - 2
    y = lax.dot_general(
        x.astype(jnp.float32),
        w,
        (((x.ndim - 1,), (contract,)), (batch, batch)),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return y.astype(x.dtype)


def _dense(packed: jax.Array, scales: jax.Array, biases: jax.Array | None, spec: QuantSpec) -> jax.Array:
    codes = packing.unpack(packed, spec.bits)
    groups = codes.reshape(spec.grouped(codes.shape))
    if spec.is_affine:
        assert biases is not None
        w = groups.astype(jnp.float32) * scales.astype(jnp.float32)[..., None] + biases.astype(jnp.float32)[..., None]
    else:
        value = _decode_e4m3 if spec.bits == 8 else _decode_e2m1
        scale = _decode_e4m3 if spec.mode == "nvfp4" else _decode_e8m0
        w = value(groups) * scale(scales.astype(jnp.uint32))[..., None]
    return w.reshape(codes.shape)


# ---- affine


def _quantize_affine(groups: jax.Array, spec: QuantSpec) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The rule of MLX's CPU kernel: the end of the range that is larger in magnitude becomes a code exactly.

    groups: float32[..., G, g] -> codes uint32[..., G, g], scales and biases float32[..., G, 1], not yet rounded: the
    codes come from the unrounded ones, as in MLX. Source: mlx/backend/cpu/quantized.cpp, `quantize`.
    """
    low = jnp.min(groups, axis=-1, keepdims=True)
    high = jnp.max(groups, axis=-1, keepdims=True)
    from_low = jnp.abs(low) > jnp.abs(high)
    step = jnp.maximum(_divide(high - low, spec.max_code), jnp.float32(1e-7))
    step = jnp.where(from_low, step, -step)
    edge = jnp.where(from_low, low, high)
    edge_code = jnp.round(_divide(edge, step))
    at_zero = edge_code == 0
    scales = jnp.where(at_zero, step, _divide(edge, edge_code))
    biases = jnp.where(at_zero, jnp.float32(0), edge)
    codes = jnp.clip(jnp.round(_divide(groups - biases, scales)), 0, spec.max_code)
    finite = jnp.isfinite(low) & jnp.isfinite(high)
    poison = jnp.float32(jnp.nan)
    codes = jnp.where(jnp.isnan(codes), jnp.float32(0), codes)
    return codes.astype(jnp.uint32), jnp.where(finite, scales, poison), jnp.where(finite, biases, poison)


# ---- float modes


def _quantize_float(groups: jax.Array, spec: QuantSpec, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """groups: float32[..., G, g] -> codes and scale bytes, uint32[..., G, g] and uint32[..., G, 1].

    MLX computes these modes in the weight's own dtype, rounding after every operation; so does this.
    Source: mlx/ops.cpp, `fp_quantize`.
    """
    round_to = functools.partial(_round_to, dtype=dtype)
    peak = jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
    scale = round_to(_divide(peak, _E4M3_MAX if spec.bits == 8 else _E2M1[-1]))
    if spec.mode == "nvfp4":
        scale_codes = _encode_e4m3(scale)
        divisor, poison = _decode_e4m3(scale_codes), _NAN_E4M3
    else:
        scale_codes = _encode_e8m0(scale)
        divisor, poison = _decode_e8m0(scale_codes), _NAN_E8M0
    values = round_to(_divide(groups, round_to(divisor)))
    codes = _encode_e4m3(values) if spec.bits == 8 else _encode_e2m1(values)
    return codes, jnp.where(jnp.isfinite(peak), scale_codes, jnp.uint32(poison))


def _encode_e8m0(x: jax.Array) -> jax.Array:
    """The least power of two that is not below x, as a byte of bias 127; 1 for x = 0. float32, x >= 0 -> uint32.

    Rounding up keeps the group's peak inside the range of the codes. MLX does the same from 0.32.4 on; before, it
    rounded the exponent to nearest and let the peak saturate.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    exponent = (bits >> 23) + ((bits & jnp.uint32(0x7FFFFF)) != 0).astype(jnp.uint32)
    return jnp.where(x == 0, jnp.uint32(127), jnp.minimum(exponent, jnp.uint32(254)))


def _encode_e2m1(x: jax.Array) -> jax.Array:
    """The nearest E2M1 code, ties to the smaller magnitude, as MLX's argmin over the 16 values finds it.

    x: float32 -> uint32 in [0, 16).
    """
    best = jnp.zeros(x.shape, jnp.uint32)
    distance = jnp.abs(x)
    for code in (*range(1, 8), *range(9, 16)):  # 8 is -0.0, never nearer than 0
        value = _E2M1[code] if code < 8 else -_E2M1[code - 8]
        candidate = jnp.abs(x - jnp.float32(value))
        nearer = candidate < distance
        best = jnp.where(nearer, jnp.uint32(code), best)
        distance = jnp.where(nearer, candidate, distance)
    return best


def _decode_e2m1(codes: jax.Array) -> jax.Array:
    """uint32 codes in [0, 16) -> float32: sign, two exponent bits of bias 1, one mantissa bit."""
    exponent, mantissa = (codes >> 1) & jnp.uint32(3), codes & jnp.uint32(1)
    normal = ((exponent + jnp.uint32(126)) << 23) | (mantissa << 22)
    half = mantissa * jnp.uint32(0x3F000000)
    sign = (codes >> 3) << 31
    return lax.bitcast_convert_type(jnp.where(exponent == 0, half, normal) | sign, jnp.float32)


def _encode_e4m3(x: jax.Array) -> jax.Array:
    """float32 -> the nearest E4M3 byte as uint32, ties to even, saturating at 448 as MLX does."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign, magnitude = bits >> 31, bits & jnp.uint32(0x7FFFFFFF)
    # Subnormal below 2**-6: multiples of 2**-9.
    subnormal = jnp.round(jnp.abs(x) * jnp.float32(2**9))
    subnormal = jnp.where(subnormal < 16, subnormal, jnp.float32(0)).astype(jnp.uint32)
    # Normal: move the exponent's bias from 127 to 7, then round the mantissa from 23 bits to 3.
    odd = (magnitude >> 20) & jnp.uint32(1)
    normal = (magnitude - jnp.uint32(120 << 23) + jnp.uint32(0x7FFFF) + odd) >> 20
    code = jnp.where(magnitude < jnp.uint32(121 << 23), subnormal, normal)
    code = jnp.where(magnitude >= jnp.uint32(0x43E00000), jnp.uint32(0x7E), code)
    return code | (sign << 7)


def _decode_e4m3(codes: jax.Array) -> jax.Array:
    """uint32 bytes -> float32; 0x7F and 0xFF are NaN. OCP 8-bit Floating Point Specification v1.0."""
    magnitude, sign = codes & jnp.uint32(0x7F), codes >> 7
    normal = lax.bitcast_convert_type((magnitude << 20) + jnp.uint32(120 << 23), jnp.float32)
    value = jnp.where(magnitude < 8, magnitude.astype(jnp.float32) * jnp.float32(2**-9), normal)
    value = jnp.where(magnitude == _NAN_E4M3, jnp.float32(jnp.nan), value)
    return jnp.where(sign == 1, -value, value)


def _decode_e8m0(codes: jax.Array) -> jax.Array:
    """uint32 bytes -> float32 2**(byte - 127); 0xFF is NaN. OCP Microscaling Formats v1.0, section 5.4.1."""
    bits = jnp.where(codes == 0, jnp.uint32(1 << 22), codes << 23)
    bits = jnp.where(codes == _NAN_E8M0, jnp.uint32(0x7FC00000), bits)
    return lax.bitcast_convert_type(bits, jnp.float32)


# ---- arithmetic that XLA must not simplify


def _divide(a: jax.Array, b: jax.Array | float) -> jax.Array:
    """a / b, correctly rounded; a itself where a is not finite.

    The divisor is made to depend on `a`, so that XLA sees neither a broadcast nor a constant to take the reciprocal of.
    """
    return a / jnp.where(jnp.isfinite(a), jnp.asarray(b, jnp.float32), jnp.float32(1))


def _round_to(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """A float32 value as it would read after a trip through `dtype`."""
    info = jnp.finfo(dtype)
    if info.bits == 32:
        return x
    rounded = lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    if info.nexp == 8:
        return rounded
    # reduce_precision flushes what is subnormal in the narrow dtype; there the values are multiples of one quantum.
    quantum = float(info.smallest_subnormal)
    subnormal = jnp.abs(x) < jnp.float32(float(info.smallest_normal))
    return jnp.where(subnormal, jnp.round(x * jnp.float32(1 / quantum)) * jnp.float32(quantum), rounded)
