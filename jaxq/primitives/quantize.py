"""`quantize`: a dense weight to codes, scales and biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching

from jaxq import _compat
from jaxq.array import QuantizedArray, normalize_axis, to_storage
from jaxq.primitives import common
from jaxq.spec import Mode, QuantSpec


def quantize(
    w: jax.typing.ArrayLike,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: Mode = "affine",
    axis: int | Sequence[int] = -1,
    implementation: str | None = None,
) -> QuantizedArray:
    """Quantize a dense weight in groups along its contracted axis.

    Args:
      w: float32, float16 or bfloat16 of rank 2 or more: `[..., N, K]` with the default `axis`.
      bits: bits per code, 2, 3, 4, 5, 6 or 8; default 4 (in the float modes, what the mode says).
      group_size: how many weights along `axis` share a scale, 16, 32, 64 or 128; default 64 (32 in mxfp4 and mxfp8,
        16 in nvfp4).
      mode: "affine", "mxfp4", "mxfp8" or "nvfp4"; see `QuantSpec`.
      axis: the axis that is grouped, the one that a matrix product will contract: -1 for `[out, in]` (torch, MLX,
        Equinox), -2 for `[in, out]` (Flax). A sequence where several are contracted together, e.g. (-3, -2) for
        `[heads, head_dim, out]`; the last of them is grouped.
      implementation: which implementation runs it; None for the fastest of the platform.

    Returns:
      A `QuantizedArray` of w's shape. Its bits are those that `mlx.core.quantize` gives on the CPU, in every format
      that MLX has. A group that holds a NaN or an infinity dequantizes to NaN, all of it.

    Raises:
      ValueError: w of rank below 2, a length that the groups don't divide, an illegal format, an unusable
        implementation.
      TypeError: a w that is not float32, float16 or bfloat16.
    """
    spec = QuantSpec(bits, group_size, mode)
    if isinstance(w, QuantizedArray):
        raise TypeError(f"quantize: w is quantized already ({w!r}); call w.dequantize() first")
    w = jnp.asarray(w)
    if w.dtype not in common.FLOAT_DTYPES:
        raise TypeError(f"quantize: w.dtype={w.dtype.name} can't be quantized; cast w to float32, float16 or bfloat16")
    if w.ndim < 2:
        raise ValueError(f"quantize: w.shape={w.shape} is of rank {w.ndim}; a weight has at least two axes")
    axes = normalize_axis("quantize", axis, w.ndim)
    length = w.shape[axes[-1]]
    if length % spec.group_size:
        raise ValueError(
            f"quantize: w.shape[{axes[-1]}]={length} is not a multiple of group_size={spec.group_size}; "
            f"pick a group_size that divides it (w.shape={w.shape})"
        )
    if length % spec.length_multiple:
        raise ValueError(
            f"quantize: w.shape[{axes[-1]}]={length} codes of {spec.bits} bits don't fill whole 32-bit words; "
            f"the length must be a multiple of {spec.length_multiple}, or bits another (w.shape={w.shape})"
        )
    name = common.resolve_implementation("quantize", implementation, "quantize", spec)
    leaves = quantize_p.bind(to_storage(w, axes), spec=spec, implementation=name)
    return QuantizedArray(*leaves, spec=spec, axis=axes)


def _abstract_eval(w: Any, *, spec: QuantSpec, implementation: str | None) -> list[Any]:
    *lead, length = w.shape
    partition = _compat.partition(w)
    packed = _compat.result_aval([w], (*lead, spec.words(length)), np.uint32, partition)
    scales = _compat.result_aval([w], (*lead, spec.groups(length)), spec.scale_dtype(w.dtype), partition)
    return [packed, scales, scales] if spec.is_affine else [packed, scales]


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, spec: QuantSpec, implementation: str | None) -> Any:
    """The derivative where it exists: codes are piecewise constant; scales and biases move with the group's edge.

    With e the end of the group's range that is larger in magnitude and c = round(e / step) its code before the shift,
    scale = e / c and bias = e (where c = 0: a scale that moves with the range, or not at all at its floor, which is
    taken as constant, and bias 0).
    """
    (w,), (dw,) = primals, tangents
    outs = quantize_p.bind(w, spec=spec, implementation=implementation)
    zeros = [common.zero_tangent(out) for out in outs]
    if common.is_zero(dw) or not spec.is_affine:
        return outs, zeros
    _, scales, biases = outs
    shape = spec.grouped(w.shape)
    groups, dgroups = w.reshape(shape), dw.reshape(shape)
    low, high = jnp.min(groups, -1, keepdims=True), jnp.max(groups, -1, keepdims=True)
    low_at, high_at = jnp.argmin(groups, -1, keepdims=True), jnp.argmax(groups, -1, keepdims=True)
    at = jnp.where(jnp.abs(low) > jnp.abs(high), low_at, high_at)
    dedge = jnp.take_along_axis(dgroups, at, axis=-1)[..., 0]
    # The code of the edge, back from the rounded results; a nonzero integer below 2**8, so rounding can't hurt it.
    shifted = biases != 0
    code = jnp.round(biases.astype(jnp.float32) / jnp.where(shifted, scales, 1).astype(jnp.float32))
    dscales = jnp.where(shifted, dedge / jnp.where(shifted, code, 1).astype(w.dtype), 0)
    dbiases = jnp.where(shifted, dedge, 0)
    return outs, [zeros[0], dscales, dbiases]


def _batch(args: Sequence[Any], dims: Sequence[int | None], **parameters: Any) -> Any:
    outs = quantize_p.bind(*common.batch_leading(args, dims), **parameters)
    return outs, [0] * len(outs)


quantize_p = common.define("quantize", _abstract_eval, multiple_results=True)
ad.primitive_jvps[quantize_p] = _jvp
batching.primitive_batchers[quantize_p] = _batch
