"""`cpu`: the C++ kernels of `jaxq/kernels/cpu`, through XLA's FFI.

`cpu` takes the best instruction set that the machine has; `cpu:avx2` and the like forbid everything above the one
named. The kernels compute in float32 (or in integers that are exact) and round once, like `xla`; sums are taken in
another order, so results differ from `xla`'s by float32 rounding. They are the same from run to run, whatever the
number of threads.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import _compat, kernels
from jaxq.spec import QuantSpec

NAME = "cpu"
PLATFORMS = ("cpu",)
OPAQUE = True
INDEXES = True


@functools.cache
def unavailable() -> str | None:
    """Why the kernels can't be used; registers their handlers with XLA where they can."""
    try:
        library = kernels.cpu_library()
    except kernels.KernelsUnavailable as error:
        return str(error)
    for name in kernels.CPU_HANDLERS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None


def refuses(op: str, *, spec: QuantSpec) -> str | None:
    return None


def variants() -> tuple[str, ...]:
    """`cpu:ISA` for every instruction set that this machine can run, best first."""
    if unavailable() is not None:
        return ()
    return tuple(f"cpu:{name}" for name, missing in kernels.isas(kernels.cpu_library()).items() if missing is None)


def quantize(w: jax.Array, *, spec: QuantSpec, implementation: str | None = None) -> list[jax.Array]:
    """w: float[..., N, K] -> packed uint32[..., N, W], scales[..., N, G] and, in mode affine, biases[..., N, G]."""
    *lead, length = w.shape
    scales = jax.ShapeDtypeStruct((*lead, spec.groups(length)), spec.scale_dtype(w.dtype))
    packed = jax.ShapeDtypeStruct((*lead, spec.words(length)), jnp.uint32)
    results = [packed, scales, scales] if spec.is_affine else [packed, scales]
    return list(_call("jaxq_quantize_cpu", results, w, spec=spec, implementation=implementation))


def dequantize(
    packed: jax.Array,
    scales: jax.Array,
    biases: jax.Array | None = None,
    *,
    spec: QuantSpec,
    dtype: np.dtype,
    implementation: str | None = None,
) -> jax.Array:
    """packed uint32[..., N, W], scales and biases [..., N, G] -> dtype[..., N, K]."""
    result = jax.ShapeDtypeStruct((*packed.shape[:-1], spec.length(packed.shape[-1])), dtype)
    leaves = (packed, scales) if biases is None else (packed, scales, biases)
    return _call("jaxq_dequantize_cpu", result, *leaves, spec=spec, implementation=implementation)


def quantized_matmul(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    biases: jax.Array | None = None,
    *,
    spec: QuantSpec,
    transpose: bool,
    index: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """x[B..., M, K] by w[B..., N, K] -> x.dtype[B..., M, N], or x[B..., M, N] -> [B..., M, K] where not `transpose`.

    With an index, int32[], w is an element of a stack [L, B..., N, K], which is read where it lies.
    """
    outer = packed.shape[-2] if transpose else spec.length(packed.shape[-1])
    result = jax.ShapeDtypeStruct((*x.shape[:-1], outer), x.dtype)
    operands = [x, packed, scales, *(leaf for leaf in (biases, index) if leaf is not None)]
    name = "jaxq_quantized_matmul_cpu"
    return _call(name, result, *operands, spec=spec, implementation=implementation, transpose=transpose)


def cached_attention(*operands: jax.Array, scale: float, implementation: str | None = None) -> Any:
    """q[B, S, H, hd], k and v [B, S, KV, hd], two caches [L, B, KV, T, hd], int32[] twice -> y, as q, and the caches.

    What `jaxq.attention.cached_attention` says; the caches are updated where they lie.
    """
    operands = _compat.align_varying(*operands)
    results = tuple(jax.typeof(operands[i]) for i in (0, 3, 4))
    call = jax.ffi.ffi_call(
        "jaxq_cached_attention_cpu", results, vmap_method="sequential", input_output_aliases={3: 1, 4: 2}
    )
    return call(*operands, scale=np.float32(scale), isa=_isa(implementation))


def _isa(implementation: str | None) -> str:
    return (implementation or "").partition(":")[2]


def _call(
    target: str, results: Any, *operands: jax.Array, spec: QuantSpec, implementation: str | None, **attributes: Any
) -> Any:
    return jax.ffi.ffi_call(target, results)(
        *operands,
        mode=spec.mode,
        bits=np.int64(spec.bits),
        group_size=np.int64(spec.group_size),
        isa=_isa(implementation),
        **attributes,
    )
