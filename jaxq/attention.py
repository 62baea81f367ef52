"""Attention over a cache of keys and values that new tokens join in place: what a decoding step does between products.

B: batch; S: new tokens; L: layers; H, KV: heads of queries and of keys and values; T: length of the cache; hd: length
of a head.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.lowerings import cpu
from jaxq.primitives import common


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    *,
    layer: Any,
    position: Any,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Causal attention of new tokens over one layer of a cache, after writing their keys and values into it.

    Token s stands at `position + s`; its queries see the positions up to that one: y = softmax(scale * q k^T) v, where
    head h reads the keys and values of head `h // (H // KV)`. Keys and values are read as the cache holds them, rounded
    to its dtype.

    On CPUs it is one call of jaxq's kernels, which sums in float32, rounds once, gives the same bits whatever the
    number of threads, and updates the cache where it lies: carry the cache through `lax.scan` or `lax.while_loop`, or
    donate it to `jax.jit`, and nothing of it is copied. Elsewhere, and without the kernels, it is plain JAX, which
    rounds the weights of the softmax to the dtype of the cache; so do the kernels where many queries in bfloat16 (a
    prompt's) meet a cache in bfloat16 and the CPU multiplies such numbers. Derivatives are those of plain JAX; under
    `jax.vmap` the kernels run one member after the other.

    Args:
      q: float[B, S, H, hd].
      k, v: [B, S, KV, hd] in q's dtype; KV divides H.
      cache_k, cache_v: float[L, B, KV, T, hd], of one dtype, which need not be q's.
      layer: int32[], which layer of the cache, from 0 to L - 1.
      position: int32[], of the first new token, from 0 to T - S. What lies in the cache from there on does not count
        if it is finite.
      scale: of the products; default: `hd ** -0.5`.
      implementation: "xla" for plain JAX, "cpu" or "cpu:avx2" and the like for the kernels; None for the fastest of the
        platform. The others that jaxq knows have no attention of their own, and stand for plain JAX.

    Returns:
      y, as q; and the two caches with the new tokens in layer `layer`.

    Raises:
      TypeError: a dtype that is none of float32, float16 and bfloat16, or not that of its fellow; a layer or position
        that is no integer.
      ValueError: shapes that do not fit, an unusable implementation. A traced layer or position out of range is an
        error of the kernels when they run; plain JAX moves it into the range, as its slices do.
    """
    _check(q, k, v, cache_k, cache_v)
    at = [_index(name, value) for name, value in (("layer", layer), ("position", position))]
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    name = common.current_implementation() if implementation is None else implementation
    common.check_implementation("cached_attention", name)
    usable = cpu.unavailable() is None and (name is None or name.partition(":")[0] == cpu.NAME)
    choice = (name or cpu.NAME) if usable else None
    return _attention(q, k, v, cache_k, cache_v, *at, scale=scale, kernel=choice, only=usable and name is not None)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, *, scale: float | None = None
) -> jax.Array:
    """Causal attention with grouped queries, in plain JAX: differentiable, on every platform.

    Args:
      q: float[B, S, H, hd].
      k, v: float[B, KV, T, hd], of positions 0 to T - 1; KV divides H.
      positions: int32[S], of the queries; each sees the keys up to its own.
      scale: of the products; default: `hd ** -0.5`.

    Returns:
      float[B, S, H, hd] in q's dtype; the softmax is float32, its weights are rounded to v's dtype.
    """
    batch, length, heads, dim = q.shape
    groups = k.shape[1]
    repeat = heads // groups
    # The queries that share keys become the rows of one plain batched product, without a transposed operand.
    rows = jnp.transpose(q.reshape(batch, length, groups, repeat, dim), (0, 2, 3, 1, 4))
    rows = rows.reshape(batch * groups, repeat * length, dim)
    k, v = k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:])
    scores = jnp.einsum("nmd,ntd->nmt", rows, k, preferred_element_type=jnp.float32)
    scores = scores * jnp.float32(dim**-0.5 if scale is None else scale)
    seen = jnp.arange(k.shape[1]) <= jnp.tile(positions, repeat)[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.float32(-jnp.inf)), axis=-1).astype(v.dtype)
    y = jnp.einsum("nmt,ntd->nmd", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)
    y = y.reshape(batch, groups, repeat, length, dim)
    return jnp.transpose(y, (0, 3, 1, 2, 4)).reshape(batch, length, heads, dim)


@functools.partial(jax.jit, static_argnames=("scale", "kernel", "only"), inline=True)
def _attention(*operands: jax.Array, scale: float, kernel: str | None, only: bool) -> Any:
    """kernel: the implementation that runs on CPUs, None for plain JAX there too; only: and nothing runs elsewhere."""
    if kernel is None:
        return _plain(*operands, scale=scale)
    run = functools.partial(_kernel, scale, kernel)
    default = None if only else functools.partial(_plain, scale=scale)
    return lax.platform_dependent(*operands, cpu=run, default=default)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _kernel(scale: float, implementation: str, *operands: jax.Array) -> Any:
    return cpu.cached_attention(*operands, scale=scale, implementation=implementation)


@_kernel.defjvp
def _kernel_jvp(scale: float, implementation: str, primals: Any, tangents: Any) -> Any:
    return jax.jvp(functools.partial(_plain, scale=scale), primals, tangents)


def _plain(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    layer: jax.Array,
    position: jax.Array,
    *,
    scale: float,
) -> Any:
    def write(cache: jax.Array, new: jax.Array) -> jax.Array:
        rows = jnp.swapaxes(new, 1, 2).astype(cache.dtype)
        return lax.dynamic_update_slice(cache, rows[None], (layer, 0, 0, position, 0))

    # The barrier gives the update one user. Without it XLA on CPUs fuses the update into each user, attention and the
    # result, which can't then share the buffer, and copies the cache four times a layer.
    cache_k, cache_v = lax.optimization_barrier((write(cache_k, k), write(cache_v, v)))
    keys, values = (lax.dynamic_index_in_dim(cache, layer, keepdims=False) for cache in (cache_k, cache_v))
    dtype = q.dtype
    if dtype != keys.dtype:
        q, keys, values = (x.astype(jnp.float32) for x in (q, keys, values))
    y = attention(q, keys, values, position + jnp.arange(q.shape[1], dtype=jnp.int32), scale=scale)
    return y.astype(dtype), cache_k, cache_v


def _check(q: Any, k: Any, v: Any, cache_k: Any, cache_v: Any) -> None:
    def fail(what: str) -> None:
        shapes = f"q.shape={q.shape}, k.shape={k.shape}, v.shape={v.shape}, "
        shapes += f"cache_k.shape={cache_k.shape}, cache_v.shape={cache_v.shape}"
        raise ValueError(f"cached_attention: {what} ({shapes})")

    for name, x in (("q", q), ("cache_k", cache_k)):
        if x.dtype not in common.FLOAT_DTYPES:
            raise TypeError(f"cached_attention: {name}.dtype={x.dtype}; pick float32, float16 or bfloat16")
    for name, x, fellow, other in (("k", k, "q", q), ("v", v, "q", q), ("cache_v", cache_v, "cache_k", cache_k)):
        if x.dtype != other.dtype:
            raise TypeError(f"cached_attention: {name}.dtype={x.dtype} must be that of {fellow}, {other.dtype}")
    if q.ndim != 4 or k.ndim != 4 or cache_k.ndim != 5:
        fail("q, k and cache_k must be [B, S, H, hd], [B, S, KV, hd] and [L, B, KV, T, hd]")
    batch, tokens, heads, dim = q.shape
    groups, length = k.shape[2], cache_k.shape[3]
    if k.shape != (batch, tokens, groups, dim) or v.shape != k.shape:
        fail("k and v must be [B, S, KV, hd] where q is [B, S, H, hd]")
    if cache_k.shape[1:] != (batch, groups, length, dim) or cache_v.shape != cache_k.shape:
        fail("cache_k and cache_v must be [L, B, KV, T, hd] where k is [B, S, KV, hd]")
    if groups == 0 or heads % groups:
        fail(f"KV={groups} heads of keys must divide the H={heads} heads of queries")
    if tokens > length or cache_k.shape[0] == 0:
        fail(f"the cache has no room for S={tokens} tokens; make it longer")


def _index(name: str, value: Any) -> jax.Array:
    if np.ndim(value) != 0 or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise TypeError(f"cached_attention: {name}={value!r}; pass one integer, int32[]")
    return jnp.asarray(value, jnp.int32)
