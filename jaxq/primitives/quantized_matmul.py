"""`quantized_matmul`: a dense array times a quantized weight, without a dense copy of the weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad, batching

from jaxq import _compat
from jaxq.array import QuantizedArray, check_complete
from jaxq.primitives import common
from jaxq.primitives.dequantize import weight_cotangents
from jaxq.spec import QuantSpec


def quantized_matmul(
    x: jax.typing.ArrayLike,
    qw: QuantizedArray,
    *,
    transpose: bool = True,
    index: jax.typing.ArrayLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply by a quantized weight: `x @ w.T` for a weight that is stored `w[..., N, K]`, grouped along K.

    With an `index` the weight is `qw[index]`, which the CPU kernels read where it lies. So a loop over the layers of a
    stack closes over the stack and counts: a `jax.lax.scan` over the stack itself would copy each layer out of it.

    Args:
      x: float32, float16 or bfloat16 `[..., M, K]` or `[K]` (`[..., M, N]` or `[N]` where not `transpose`).
      qw: the weight. Its leading axes, if any, are batch axes and broadcast against those of x, as in `jnp.matmul`.
      transpose: whether x's last axis is contracted with the grouped axis of qw (MLX's word), or with the other one.
      index: int[], traced or not: which element of qw's first axis to multiply by. As in `jax.lax.dynamic_index_in_dim`
        a negative one counts from the end, and one out of range means the nearest that is in range.
      implementation: which implementation runs it; None for the fastest of the platform.

    Returns:
      `[..., M, N]` (`[..., M, K]` where not `transpose`) in x's dtype; computed in float32 and rounded once.

    Raises:
      TypeError: a qw that is no QuantizedArray; an x that is one, or that is not float32, float16 or bfloat16; an index
        that is no int.
      ValueError: an index that is no scalar, or with a qw of less than three axes, or whose first axis is grouped;
        lengths that don't match, batch axes that don't broadcast, an unusable implementation.
    """
    if not isinstance(qw, QuantizedArray):
        raise TypeError(f"quantized_matmul: qw is a {type(qw).__name__}; pass a QuantizedArray")
    if isinstance(x, QuantizedArray):
        raise TypeError("quantized_matmul: both operands are quantized; call x.dequantize() on one of them")
    check_complete("quantized_matmul", qw)
    if len(qw.axis) > 1:
        raise ValueError(
            f"quantized_matmul: qw contracts {len(qw.axis)} axes together (axis={qw.axis}); "
            "call jnp.einsum or jnp.tensordot under jaxq.dispatch"
        )
    x = jnp.asarray(x)
    if x.dtype not in common.FLOAT_DTYPES:
        raise TypeError(f"quantized_matmul: x.dtype={x.dtype.name}; cast x to float32, float16 or bfloat16")
    if x.ndim == 0:
        raise ValueError("quantized_matmul: x is a scalar; it needs an axis to contract")
    *_, rows, length = qw.storage_shape
    contracted = length if transpose else rows
    if x.shape[-1] != contracted:
        raise ValueError(
            f"quantized_matmul: x.shape[-1]={x.shape[-1]} does not match the {contracted} of the weight's "
            f"{'grouped' if transpose else 'other'} axis (x.shape={x.shape}, weight [..., {rows}, {length}], "
            f"transpose={transpose})"
        )
    name = common.resolve_implementation("quantized_matmul", implementation, "quantized_matmul", qw.spec)
    parameters: dict[str, Any] = dict(spec=qw.spec, transpose=bool(transpose), implementation=name)
    chosen = () if index is None else (_check_index(index, qw),)
    if len(qw.storage_shape) == 2 + len(chosen):
        return bind_quantized_matmul(x, *qw.leaves, *chosen, **parameters)
    return _broadcast_batch(x, qw.leaves, chosen, parameters)


def _check_index(index: Any, qw: QuantizedArray) -> jax.Array:
    """int32[], counted from the beginning, in range."""
    index = jnp.asarray(index)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"quantized_matmul: index is {index.dtype.name}; pass an int")
    if index.ndim:
        raise ValueError(
            f"quantized_matmul: index.shape={index.shape}; pass a scalar, and use jax.vmap for several at once"
        )
    if qw.ndim < 3 or qw.axis[0] == -qw.ndim:
        raise ValueError(
            f"quantized_matmul: index needs a stack of weights, not qw.shape={qw.shape} with axis={qw.axis[0]}"
        )
    if not qw.shape[0]:
        raise ValueError(f"quantized_matmul: index into an empty stack (qw.shape={qw.shape})")
    if index.dtype != jnp.int32:
        own, ours = jnp.iinfo(index.dtype), jnp.iinfo(jnp.int32)
        index = jnp.clip(index, max(own.min, ours.min), min(own.max, ours.max)).astype(jnp.int32)
    return jnp.clip(jnp.where(index < 0, index + qw.shape[0], index), 0, qw.shape[0] - 1)


def bind_quantized_matmul(
    x: Any, *leaves: Any, spec: QuantSpec, transpose: bool, implementation: str | None = None
) -> jax.Array:
    """The primitive on storage: x[B..., ..., K], packed uint32[B..., N, W], scales and biases [B..., N, G].

    B... are the weight's leading axes and stand first in x too; what x has between them and its last axis is free.
    After the leaves may come an index, int32[]; the leaves then have an axis in front, of which it takes one element.
    """
    operands = _compat.align_varying(x, *leaves)
    return quantized_matmul_p.bind(*operands, spec=spec, transpose=transpose, implementation=implementation)


def split(operands: Sequence[Any], spec: QuantSpec) -> tuple[Any, list[Any], list[Any]]:
    """The operands of the primitive: x, the leaves, and the index in a list that is empty where there is none."""
    x, *rest = operands
    return x, rest[: spec.leaf_count], rest[spec.leaf_count :]


def element(leaves: Sequence[Any], index: Any) -> list[jax.Array]:
    """The leaves of one element of a stack, copied out of it."""
    return [lax.dynamic_index_in_dim(leaf, index, keepdims=False) for leaf in leaves]


def _broadcast_batch(
    x: jax.Array, leaves: Sequence[Any], index: Sequence[jax.Array], parameters: dict[str, Any]
) -> jax.Array:
    """Batch axes broadcast as in `jnp.matmul`; an axis that the weight lacks joins the rows of x, so nothing of the
    weight is copied, while one that x lacks is broadcast in x, which is the small operand."""
    vector = x.ndim == 1
    x = x[None] if vector else x
    stack, weight_batch = leaves[0].shape[: len(index)], leaves[0].shape[len(index) : -2]
    try:
        batch = np.broadcast_shapes(x.shape[:-2], weight_batch)
    except ValueError:
        raise ValueError(
            f"quantized_matmul: the batch axes of x, {x.shape[:-2]}, don't broadcast with the weight's, {weight_batch}"
        ) from None
    x = jnp.broadcast_to(x, (*batch, *x.shape[-2:]))
    own = [i for i, size in enumerate((1,) * (len(batch) - len(weight_batch)) + weight_batch) if size != 1]
    free = [i for i in range(len(batch)) if i not in own]
    order = [*own, *free, x.ndim - 2, x.ndim - 1]
    sizes = [batch[i] for i in own]
    leaves = [leaf.reshape(*stack, *sizes, *leaf.shape[-2:]) for leaf in leaves]
    y = bind_quantized_matmul(lax.transpose(x, order), *leaves, *index, **parameters)
    y = lax.transpose(y, np.argsort(order))
    return y[..., 0, :] if vector else y


def _abstract_eval(*operands: Any, spec: QuantSpec, transpose: bool, implementation: str | None) -> Any:
    x, leaves, index = split(operands, spec)
    packed = leaves[0]
    if index:
        if index[0].shape != () or index[0].dtype != np.int32 or packed.ndim < 3:
            raise ValueError(f"quantized_matmul: index {index[0]} does not fit packed{list(packed.shape)} ({spec})")
        if part := _compat.partition(packed)[0]:
            raise ValueError(
                f"quantized_matmul: the indexed axis is partitioned over mesh axis {part!r} of an explicit mesh; "
                "partition another one"
            )
        packed = _compat.result_aval([packed], packed.shape[1:], packed.dtype, _compat.partition(packed)[1:])
    batch = packed.ndim - 2
    *_, rows, length = spec.storage_shape(packed.shape)
    contracted, out = (length, rows) if transpose else (rows, length)
    if x.shape[:batch] != packed.shape[:batch] or x.ndim <= batch or x.shape[-1] != contracted:
        raise ValueError(f"quantized_matmul: x{list(x.shape)} does not fit packed{list(packed.shape)} ({spec})")
    *lead, x_part = _compat.partition(x)
    row_part, word_part = _compat.partition(packed)[-2:]
    contracted_part, out_part = (word_part, row_part) if transpose else (row_part, word_part)
    if x_part is not None or contracted_part is not None:
        raise ValueError(
            f"quantized_matmul: the contracted axis is partitioned over mesh axis {x_part or contracted_part!r} of an "
            "explicit mesh; use jax.shard_map with a psum, or a mesh axis of type Auto"
        )
    return _compat.result_aval(operands, (*x.shape[:-1], out), x.dtype, (*lead, out_part))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **parameters: Any) -> Any:
    """Linear in x, and in scales and biases together; both tangents are quantized products themselves."""
    x, (packed, *params), index = split(primals, parameters["spec"])
    dx, (_, *dparams), _ = split(tangents, parameters["spec"])
    out = quantized_matmul_p.bind(*primals, **parameters)
    tangent = common.zero_tangent(out)
    if not common.is_zero(dx):
        tangent = quantized_matmul_p.bind(dx, packed, *params, *index, **parameters)
    if not all(common.is_zero(t) for t in dparams):
        dparams = [common.instantiate(t, p) for t, p in zip(dparams, params, strict=True)]
        tangent = ad.add_tangents(tangent, quantized_matmul_p.bind(x, packed, *dparams, *index, **parameters))
    return out, tangent


def _transpose(ct: Any, *operands: Any, spec: QuantSpec, transpose: bool, implementation: str | None) -> list[Any]:
    x, (packed, *params), index = split(operands, spec)
    if type(ct) is ad.Zero:
        return [ad.Zero(operand.aval) if ad.is_undefined_primal(operand) else None for operand in operands]
    if ad.is_undefined_primal(x):
        dx = quantized_matmul_p.bind(
            ct, packed, *params, *index, spec=spec, transpose=not transpose, implementation=implementation
        )
        return [dx, *(None for _ in operands[1:])]
    # ct[B..., M, N] and x[B..., M, K] (the other way round where not transpose) -> the cotangent of w[B..., N, K].
    avals = [p.aval if ad.is_undefined_primal(p) else jax.typeof(p) for p in params]
    rows, columns = (operand.astype(jnp.float32) for operand in ((ct, x) if transpose else (x, ct)))
    (own,) = element([packed], *index) if index else (packed,)
    dparams = _weight_cotangents(rows, columns, own, [aval.dtype for aval in avals], spec)
    if index:
        zeros = [jnp.zeros(aval.shape, aval.dtype) for aval in avals]
        dparams = [lax.dynamic_update_index_in_dim(z, d, *index, 0) for z, d in zip(zeros, dparams, strict=True)]
    return [None, None, *dparams, *(None for _ in index)]


# How many entries of a weight's cotangent exist at a time: 4 MiB in float32, which caches hold.
_SLOPE_ENTRIES = 2**20


def _weight_cotangents(
    rows: jax.Array, columns: jax.Array, packed: jax.Array, dtypes: Sequence[Any], spec: QuantSpec
) -> list[jax.Array]:
    """Cotangents of scales and biases, [B..., N, G] each, where that of w[B..., N, K] is rows.T @ columns.

    rows: float32[B..., M..., N], columns: float32[B..., M..., K]. The product is as large as the dense weight, so only
    some rows of it are made at a time. These stand `count` apart: a partition of the axis by XLA leaves each step whole
    then, which it would not with neighbours.
    """
    sharded = any(part is not None for a in (rows, columns, packed) for part in _compat.partition(jax.typeof(a)))
    *lead, size, words = packed.shape
    count = 1 if sharded else min(size, -(-math.prod((*lead, size, spec.length(words))) // _SLOPE_ENTRIES))

    def slope(rows: jax.Array, columns: jax.Array) -> jax.Array:
        batch, free = tuple(range(len(lead))), tuple(range(len(lead), rows.ndim - 1))
        return lax.dot_general(rows, columns, ((free, free), (batch, batch)), precision=lax.Precision.HIGHEST)

    def of_rows(rows: jax.Array, packed: jax.Array) -> jax.Array:
        return weight_cotangents(slope(rows, columns), packed, dtypes, spec)[0]

    biases = slope(rows, columns.reshape(spec.grouped(columns.shape)).sum(-1)).astype(dtypes[1])
    if count == 1:
        return [of_rows(rows, packed), biases]
    even = size - size % count
    of_x = rows[..., :even].reshape(*rows.shape[:-1], even // count, count)
    of_w = packed[..., :even, :].reshape(*lead, even // count, count, words)

    def step(i: jax.Array) -> jax.Array:
        at = functools.partial(lax.dynamic_index_in_dim, index=i, keepdims=False)
        return of_rows(at(of_x, axis=-1), at(of_w, axis=-2))

    scales = jnp.moveaxis(lax.map(step, jnp.arange(count)), 0, -2).reshape(*lead, even, -1)
    if even == size:
        return [scales, biases]
    rest = of_rows(rows[..., even:], packed[..., even:, :])
    return [jnp.concatenate([scales, rest], -2), biases]


def _batch(args: Sequence[Any], dims: Sequence[int | None], **parameters: Any) -> Any:
    """A batch of x alone becomes more rows, and the weight is read once; a batch of weights becomes a batch axis.

    So does a batch of what an index takes from a stack, which is copied out of it for the purpose.
    """
    (x, leaves, index), (x_dim, *dims) = split(args, parameters["spec"]), dims
    if x_dim is not None and all(dim is None for dim in dims):
        axis = leaves[0].ndim - 2 - len(index)
        return quantized_matmul_p.bind(jnp.moveaxis(x, x_dim, axis), *leaves, *index, **parameters), axis
    if index:
        leaf_dims, index_dim = tuple(dims[:-1]), dims[-1]
        leaves = jax.vmap(element, in_axes=(list(leaf_dims), index_dim))(leaves, *index)
        dims = [0 for _ in leaves]
    return quantized_matmul_p.bind(*common.batch_leading([x, *leaves], [x_dim, *dims]), **parameters), 0


def canonical(x: Any, leaves: Sequence[Any], index: Sequence[Any] = ()) -> tuple[jax.Array, list[jax.Array]]:
    """x[M, K] with leaves of rank 2, or x[B, M, K] with leaves of rank 3: what the lowerings take.

    Leaves have their stack's axis in front of that where there is an index.
    """
    batch = leaves[0].ndim - 2 - len(index)
    sizes = x.shape[:batch]
    lead = (math.prod(sizes),) if batch else ()
    x = x.reshape(*lead, math.prod(x.shape[batch:-1]), x.shape[-1])
    return x, [leaf.reshape(*leaf.shape[: len(index)], *lead, *leaf.shape[-2:]) for leaf in leaves]


quantized_matmul_p = common.define("quantized_matmul", _abstract_eval, multiple_results=False)
ad.primitive_jvps[quantized_matmul_p] = _jvp
ad.primitive_transposes[quantized_matmul_p] = _transpose
batching.primitive_batchers[quantized_matmul_p] = _batch
