"""`mps`: Apple's GPUs by way of the jax-mps plugin, whose own custom calls run MLX's Metal kernels without Python.

The plugin knows them for affine weights of 4 and 8 bits: `mps.quantize`, `mps.dequantize`, `mps.quantized_matmul`,
each with a JSON text for its attributes (as in jax-mps 0.11.1). Programs for the platform can be lowered on any
machine: `jax.jit(f).trace(x).lower(lowering_platforms=("mps",))`. A module for several platforms gets plain operations,
since the others could not compile the calls.

What the plugin takes, and what is done to fit it:
  - x of rank 2 with one weight: other axes of x are its rows, and a batch of weights becomes a call for each;
  - x, scales and biases of one dtype, which is also the result's: where they differ, they are widened to float32,
    and the result is rounded to the dtype asked for.

What differs from `xla`, by the nature of MLX's Metal kernels: with operands of float16 or bfloat16 the kernels for
several rows round each dequantized weight to that dtype before it is multiplied, and then sum in float32; and
`quantize` always takes 0 into a group's range and rounds ties away from zero, so its bits can differ from those of
`mlx.core.quantize` on the CPU. Groups with a NaN or an infinity are poisoned here, in plain operations.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir

from jaxq.spec import QuantSpec

NAME = "mps"
PLATFORMS = ("mps",)


def unavailable() -> str | None:
    """None: without the plugin there is no such device, but programs can be lowered for it everywhere."""
    return None


def refuses(op: str, *, spec: QuantSpec) -> str | None:
    if not spec.is_affine or spec.bits not in (4, 8) or spec.group_size == 16:
        return f"jax-mps has affine weights of 4 and 8 bits in groups of 32, 64 and 128, not {spec}"
    return None


def unsuited(ctx: mlir.LoweringRuleContext) -> str | None:
    if len(ctx.module_context.platforms) > 1:
        return "the custom calls of jax-mps can't stand in a program for several platforms"
    return None


def quantize(w: jax.Array, *, spec: QuantSpec) -> list[jax.Array]:
    """w: float[..., N, K] -> packed uint32[..., N, W], scales and biases [..., N, G]."""
    *lead, length = w.shape
    rows = w.reshape(-1, length) if w.size else w.reshape(int(np.prod(lead)), length)
    sizes = (spec.words(length), spec.groups(length), spec.groups(length))
    dtypes = (np.dtype(np.uint32), w.dtype, w.dtype)
    results = [jax.core.ShapedArray((rows.shape[0], n), dtype) for n, dtype in zip(sizes, dtypes, strict=True)]
    packed, *params = (out.reshape(*lead, out.shape[-1]) for out in _call("quantize", results, rows, **_format(spec)))
    finite = jnp.isfinite(w).reshape(*lead, spec.groups(length), spec.group_size).all(-1)
    return [packed, *(jnp.where(finite, p, jnp.asarray(jnp.nan, p.dtype)) for p in params)]


def dequantize(
    packed: jax.Array, scales: jax.Array, biases: jax.Array, *, spec: QuantSpec, dtype: np.dtype
) -> jax.Array:
    """packed uint32[..., N, W], scales and biases [..., N, G] -> dtype[..., N, K]."""
    shape = spec.storage_shape(packed.shape)
    packed, scales, biases = (leaf.reshape(-1, leaf.shape[-1]) for leaf in (packed, scales, biases))
    scales, biases = _same_dtype(dtype, scales, biases)
    result = jax.core.ShapedArray((packed.shape[0], shape[-1]), scales.dtype)
    (w,) = _call("dequantize", [result], packed, scales, biases, **_format(spec))
    return w.reshape(shape).astype(dtype)


def quantized_matmul(
    x: jax.Array, packed: jax.Array, scales: jax.Array, biases: jax.Array, *, spec: QuantSpec, transpose: bool
) -> jax.Array:
    """x[B..., M, K] by w[B..., N, K] -> x.dtype[B..., M, N], or x[B..., M, N] -> [B..., M, K] where not `transpose`."""
    if x.ndim == 3:
        pairs = [(x[i], packed[i], scales[i], biases[i]) for i in range(x.shape[0])]
        return jnp.stack([quantized_matmul(*pair, spec=spec, transpose=transpose) for pair in pairs])
    dtype = x.dtype
    if x.dtype != scales.dtype:
        x = x.astype(jnp.float32)
    scales, biases = _same_dtype(x.dtype, scales, biases)
    rows, length = spec.storage_shape(packed.shape)
    result = jax.core.ShapedArray((x.shape[0], rows if transpose else length), x.dtype)
    attributes = {"transpose": int(transpose)} | _format(spec)
    (y,) = _call("quantized_matmul", [result], x, packed, scales, biases, **attributes)
    return y.astype(dtype)


def _same_dtype(dtype: np.dtype, scales: jax.Array, biases: jax.Array) -> tuple[jax.Array, jax.Array]:
    """scales and biases as they are where they are of `dtype`, else in float32."""
    return (scales, biases) if scales.dtype == dtype else (scales.astype(jnp.float32), biases.astype(jnp.float32))


def _format(spec: QuantSpec) -> dict[str, int]:
    return {"group_size": spec.group_size, "bits": spec.bits}


# ---- the custom call. `jax.ffi` would add layouts that the plugin's own text has not.


def _call(op: str, results: Sequence[Any], *operands: jax.Array, **attributes: int) -> list[jax.Array]:
    if any(result.size == 0 for result in results) or operands[0].size == 0:
        return [jnp.zeros(result.shape, result.dtype) for result in results]
    return _call_p.bind(*operands, target=f"mps.{op}", config=json.dumps(attributes), results=tuple(results))


def _lower_call(ctx: mlir.LoweringRuleContext, *operands: Any, target: str, config: str, results: Any) -> Any:
    types = [ir.RankedTensorType.get(aval.shape, mlir.dtype_to_ir_type(np.dtype(aval.dtype))) for aval in results]
    api_version = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 2)
    return hlo.CustomCallOp(
        types, operands, target, backend_config=ir.StringAttr.get(config), api_version=api_version
    ).results


_call_p = Primitive("mps_call")
_call_p.multiple_results = True
_call_p.def_abstract_eval(lambda *_, results, **__: list(results))
mlir.register_lowering(_call_p, _lower_call)
