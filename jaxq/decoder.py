"""What a decoder computes between its products with weights: few numbers, whose cost is in the number of calls.

Each is one call of jaxq's kernels on CPUs, where XLA would run several loops one after the other, and a step that
decodes a token has hundreds of them. Elsewhere, and without the kernels, each is plain JAX. Both compute in float32 and
round once where not said otherwise. Derivatives are those of plain JAX; under `jax.vmap` the kernels run one member
after the other. `implementation` is that of `jaxq.attention.cached_attention`, with the same errors.

B: batch; S: tokens; L: layers; D: the width of a token; H, KV: heads of queries and of keys and values; hd: length of a
head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.lowerings import cpu
from jaxq.primitives import common


def add_norm(
    x: jax.Array, y: jax.Array, weights: jax.Array, *, layer: Any = 0, eps: float, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """x + y, rounded to their dtype, and that over its root mean square, times a weight.

    (In plain JAX XLA may leave that rounding out of what it normalizes.)

    Args:
      x, y: float[..., D], of one shape and dtype.
      weights: float[L, D], of all layers, read as float32.
      layer: int32[], which of them. Out of range is an error of the kernels when they run; plain JAX moves it into the
        range, as its slices do.
      eps: added to the mean square.

    Returns:
      Two arrays like x.
    """
    _check_float("add_norm", "x", x)
    if y.shape != x.shape or y.dtype != x.dtype:
        raise ValueError(f"add_norm: y is {y.dtype}{list(y.shape)}; it must be like x, {x.dtype}{list(x.shape)}")
    _check_weights("add_norm", "weights", weights, x.shape[-1])
    operands = (x, y, weights.astype(jnp.float32), index("add_norm", "layer", layer))
    return run("add_norm", _add_norm, cpu.add_norm, implementation, *operands, eps=float(eps))


def gated(x: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """silu(gate) * up, where the first half of x's last axis holds the gates: float[..., 2F] -> [..., F]."""
    _check_float("gated", "x", x)
    if x.shape[-1] % 2:
        raise ValueError(f"gated: x.shape={x.shape}; the last axis must have two halves, gates and what they scale")
    return run("gated", _gated, cpu.gated, implementation, x)


def split_heads(
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    q_weights: jax.Array | None = None,
    k_weights: jax.Array | None = None,
    *,
    heads: int,
    layer: Any = 0,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values out of one product; queries and keys normalized and turned by their positions.

    Args:
      x: float[B, S, H + 2*KV, hd], the queries first and the values last.
      cos, sin: float[S, hd/2], read as float32: coordinates i and i + hd/2 turn by angle i, as in Hugging Face's
        checkpoints.
      q_weights, k_weights: float[L, hd], read as float32, where heads are to be brought to a root mean square of 1 and
        multiplied by a weight first; both or none.
      heads: H.
      layer: int32[], which of the weights; as in `add_norm`.
      eps: added to the mean square.

    Returns:
      [B, S, H, hd], [B, S, KV, hd] and [B, S, KV, hd] in x's dtype.
    """
    _check_float("split_heads", "x", x)
    if x.ndim != 4 or x.shape[3] % 2 or not 0 <= heads <= x.shape[2] or (x.shape[2] - heads) % 2:
        raise ValueError(
            f"split_heads: x.shape={x.shape} with heads={heads}; it must be [B, S, heads + 2*KV, hd], hd even"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (x.shape[1], x.shape[3] // 2):
            raise ValueError(f"split_heads: {name}.shape={table.shape}; x.shape={x.shape} needs [S, hd/2]")
    operands = [x, cos.astype(jnp.float32), sin.astype(jnp.float32)]
    if (q_weights is None) != (k_weights is None):
        raise ValueError("split_heads: pass both q_weights and k_weights, or none of them")
    if q_weights is not None and k_weights is not None:
        for name, weights in (("q_weights", q_weights), ("k_weights", k_weights)):
            _check_weights("split_heads", name, weights, x.shape[3])
        operands += [q_weights.astype(jnp.float32), k_weights.astype(jnp.float32)]
        operands.append(index("split_heads", "layer", layer))
    static = {"heads": heads, "eps": float(eps)}
    return run("split_heads", _split_heads, cpu.split_heads, implementation, *operands, **static)


# ---- plain JAX


def _add_norm(x: jax.Array, y: jax.Array, weights: jax.Array, layer: jax.Array, *, eps: float) -> Any:
    total = x + y
    weight = lax.dynamic_index_in_dim(weights, layer, keepdims=False)
    return total, (_normalized(total.astype(jnp.float32), eps) * weight).astype(x.dtype)


def _normalized(x: jax.Array, eps: float) -> jax.Array:
    """The barrier has x widened where it is read.

    Without it XLA on CPUs hands the whole to its library of reductions, which wants it widened in memory, and gives the
    result so.
    """
    return x * lax.optimization_barrier(lax.rsqrt(_mean(x * x)[..., None] + jnp.float32(eps)))


def _mean(x: jax.Array) -> jax.Array:
    """Over the last axis: halves are added while that leaves 32 values, the rest is summed.

    XLA on CPUs makes one loop of it, with vectors along the axis; of a plain sum three, whose calls take longer.
    """
    size = x.shape[-1]
    while x.shape[-1] % 64 == 0:
        low, high = jnp.split(x, 2, axis=-1)
        x = low + high
    return jnp.sum(x, axis=-1) / jnp.float32(size)


def _gated(x: jax.Array) -> jax.Array:
    gate, up = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(x.dtype)


def _split_heads(x: jax.Array, cos: jax.Array, sin: jax.Array, *weights: jax.Array, heads: int, eps: float) -> Any:
    groups = (x.shape[2] - heads) // 2
    qk, v = jnp.split(x, (heads + groups,), axis=2)
    wide = qk.astype(jnp.float32)
    if weights:
        is_query = jnp.arange(heads + groups)[:, None] < heads
        q_weight, k_weight = (lax.dynamic_index_in_dim(w, weights[2], keepdims=False) for w in weights[:2])
        wide = _normalized(wide, eps) * jnp.where(is_query, q_weight, k_weight)
    # As one expression over [..., 2, hd/2], which XLA makes one loop of; two halves side by side would be four.
    halves = wide.reshape(*wide.shape[:-1], 2, -1)
    turned = jnp.flip(halves, -2) * jnp.array([[-1], [1]], jnp.float32)
    cos, sin = cos[:, None, None, :], sin[:, None, None, :]
    q, k = jnp.split((halves * cos + turned * sin).reshape(qk.shape).astype(x.dtype), (heads,), axis=2)
    return q, k, v


# ---- what runs


def run(
    op: str, plain: Callable, kernel: Callable, implementation: str | None, *operands: jax.Array, **static: Any
) -> Any:
    """The kernel on CPUs, where it can and may run, and plain JAX elsewhere.

    Args:
      plain: operands and static keywords -> results.
      kernel: the same with a keyword `implementation`.
      implementation: "xla" for plain JAX, "cpu" or "cpu:avx2" and the like for the kernels; None for the fastest of the
        platform, or what `use_implementation` says. The others that jaxq knows stand for plain JAX.

    Raises:
      ValueError: an unusable implementation.
    """
    name = common.current_implementation() if implementation is None else implementation
    common.check_implementation(op, name)
    usable = cpu.unavailable() is None and (name is None or name.partition(":")[0] == cpu.NAME)
    choice = (name or cpu.NAME) if usable else None
    functions = (plain, kernel, choice, usable and name is not None, tuple(sorted(static.items())))
    return _run(*operands, functions=functions)


@functools.partial(jax.jit, static_argnames="functions", inline=True)
def _run(*operands: jax.Array, functions: tuple) -> Any:
    plain, _, choice, only, static = functions
    plain = functools.partial(plain, **dict(static))
    if choice is None:
        return plain(*operands)
    call = functools.partial(_kernel, functions)
    return lax.platform_dependent(*operands, cpu=call, default=None if only else plain)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _kernel(functions: tuple, *operands: jax.Array) -> Any:
    _, kernel, choice, _, static = functions
    return kernel(*operands, implementation=choice, **dict(static))


@_kernel.defjvp
def _kernel_jvp(functions: tuple, primals: Any, tangents: Any) -> Any:
    return jax.jvp(functools.partial(functions[0], **dict(functions[4])), primals, tangents)


def index(op: str, name: str, value: Any) -> jax.Array:
    """One integer as int32[], or a TypeError."""
    if np.ndim(value) != 0 or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise TypeError(f"{op}: {name}={value!r}; pass one integer, int32[]")
    return jnp.asarray(value, jnp.int32)


def _check_float(op: str, name: str, x: Any) -> None:
    if x.dtype not in common.FLOAT_DTYPES or x.ndim == 0:
        raise TypeError(f"{op}: {name} is {x.dtype}{list(x.shape)}; pass float32, float16 or bfloat16 with an axis")


def _check_weights(op: str, name: str, weights: Any, width: int) -> None:
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(f"{op}: {name}.dtype={weights.dtype}; pass floats")
    if weights.ndim != 2 or weights.shape[1] != width or weights.shape[0] == 0:
        raise ValueError(f"{op}: {name}.shape={weights.shape}; it must be [L, {width}], the layers' weights")
