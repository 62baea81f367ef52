"""`dequantize`: codes, scales and biases back to a dense weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching

from jaxq import _compat, packing
from jaxq.array import QuantizedArray, check_complete, from_storage
from jaxq.primitives import common
from jaxq.spec import QuantSpec


def dequantize(qw: QuantizedArray, dtype: Any = None, *, implementation: str | None = None) -> jax.Array:
    """A quantized weight as a dense array of its logical shape.

    `w = scales * code + biases` in mode affine, `scale * value(code)` in the float modes, computed in float32 and
    rounded once, to `dtype`.

    Args:
      qw: the weight.
      dtype: float32, float16 or bfloat16; default: the dtype of the scales, bfloat16 in the float modes.
      implementation: which implementation runs it; None for the fastest of the platform.

    Raises:
      TypeError: a qw that is no QuantizedArray, a dtype that is none of the three.
      ValueError: an unusable implementation.
    """
    if not isinstance(qw, QuantizedArray):
        raise TypeError(f"dequantize: qw is a {type(qw).__name__}; pass a QuantizedArray")
    check_complete("dequantize", qw)
    dtype = qw.float_dtype if dtype is None else np.dtype(jnp.dtype(dtype))
    if dtype not in common.FLOAT_DTYPES:
        raise TypeError(f"dequantize: dtype={dtype.name} is not supported; pick float32, float16 or bfloat16")
    name = common.resolve_implementation("dequantize", implementation, "dequantize", qw.spec)
    return from_storage(bind_dequantize(*qw.leaves, spec=qw.spec, dtype=dtype, implementation=name), qw.axis)


def bind_dequantize(*leaves: Any, spec: QuantSpec, dtype: Any, implementation: str | None = None) -> jax.Array:
    """The primitive on storage: packed uint32[..., N, W], scales and biases [..., N, G] -> dtype[..., N, K]."""
    leaves = _compat.align_varying(*leaves)
    return dequantize_p.bind(*leaves, spec=spec, dtype=np.dtype(dtype), implementation=implementation)


def _abstract_eval(packed: Any, *params: Any, spec: QuantSpec, dtype: Any, implementation: Any) -> Any:
    return _compat.result_aval([packed, *params], spec.storage_shape(packed.shape), dtype, _compat.partition(packed))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **parameters: Any) -> Any:
    """Linear in scales and biases together, so the tangent is itself a dequantize, of their tangents."""
    packed, *params = primals
    out = dequantize_p.bind(*primals, **parameters)
    if all(common.is_zero(t) for t in tangents[1:]):
        return out, common.zero_tangent(out)
    dparams = [common.instantiate(t, p) for t, p in zip(tangents[1:], params, strict=True)]
    return out, dequantize_p.bind(packed, *dparams, **parameters)


def _transpose(ct: Any, packed: Any, *params: Any, spec: QuantSpec, **_: Any) -> list[Any]:
    if type(ct) is ad.Zero:
        return [None, *(ad.Zero(p.aval) if ad.is_undefined_primal(p) else None for p in params)]
    dtypes = [p.aval.dtype if ad.is_undefined_primal(p) else p.dtype for p in params]
    return [None, *weight_cotangents(ct, packed, dtypes, spec)]


def weight_cotangents(ct: jax.Array, packed: jax.Array, dtypes: Sequence[Any], spec: QuantSpec) -> list[jax.Array]:
    """Cotangents of scales and biases from that of the dense weight.

    ct: float[..., N, K] -> sum over each group of ct * code, and of ct: [..., N, G] each, in the `dtypes` given.
    """
    groups = spec.grouped(ct.shape)
    codes = packing.unpack(packed, spec.bits).astype(jnp.float32).reshape(groups)
    ct = ct.astype(jnp.float32).reshape(groups)
    return [(ct * codes).sum(-1).astype(dtypes[0]), ct.sum(-1).astype(dtypes[1])]


def _batch(args: Sequence[Any], dims: Sequence[int | None], **parameters: Any) -> Any:
    return dequantize_p.bind(*common.batch_leading(args, dims), **parameters), 0


dequantize_p = common.define("dequantize", _abstract_eval, multiple_results=False)
ad.primitive_jvps[dequantize_p] = _jvp
ad.primitive_transposes[dequantize_p] = _transpose
batching.primitive_batchers[dequantize_p] = _batch
