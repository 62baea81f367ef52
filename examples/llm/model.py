"""The decoder: attention with grouped queries, rotary positions, RMS norms and a gated MLP, over a reused cache.

Parameters are a dict:
  embed     [V, D]
  head      [V, D]; absent where the head is tied to the embedding
  norm      float[D]
  segments  a tuple of runs of layers; in each, every leaf has the run's layers as its first axis. Layers of one format
            make one run, under one `lax.fori_loop`; a layer in a format of its own is a run of one. Quantized weights
            go into the loop whole, with the number of the layer: see `project`
A layer is a dict:
  attention_norm, mlp_norm  float[D]
  q_norm, k_norm            float[head_dim], family qwen3
  qkv, gate_up              tuples of weights whose outputs stand side by side: `[H*hd + 2*KV*hd, D]` and `[2F, D]`.
                            One weight where the formats agree, so that one product serves all
  qkv_bias, out_bias        float, where the checkpoint has them; likewise gate_up_bias, down_bias
  out                       [D, H*hd]
  down                      [D, F]
Weights are arrays or `jaxq.QuantizedArray`s.

B: batch; S: positions of this call; T: length of the cache; D, F: hidden and intermediate size; H, KV: heads of
queries and of keys and values; hd: length of a head.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jaxq
from examples.llm import rope
from examples.llm.config import Config
from jaxq.attention import attention, cached_attention

Params = dict[str, Any]
Cache = tuple[dict[str, jax.Array], ...]


def init_cache(config: Config, params: Params, *, batch: int, length: int, dtype: Any) -> Cache:
    """Empty keys and values, one dict `k`, `v` per segment, each dtype[layers of the segment, B, KV, T, hd]."""
    counts = [segment["attention_norm"].shape[0] for segment in params["segments"]]
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    return tuple({name: jnp.zeros((count, *shape), dtype) for name in ("k", "v")} for count in counts)


def forward(config: Config, params: Params, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Logits of every position without a cache, for training and perplexity.

    Args:
      tokens: int[B, S].
      dtype: of the activations.

    Returns:
      float32[B, S, V].
    """
    hidden, _ = _run(config, params, tokens, None, jnp.int32(0), dtype)
    return logits(config, params, hidden)


def extend(
    config: Config, params: Params, tokens: jax.Array, cache: Cache, start: jax.Array, last: jax.Array
) -> tuple[jax.Array, Cache]:
    """Run tokens at positions start, start + 1, ..., with the cache of what came before.

    Args:
      tokens: int[B, S]. Those after `last` are padding: what they leave in the cache is overwritten before it is seen.
      cache: see `init_cache`; its dtype is that of the activations.
      start: int32[], tokens already in the cache. `start + S <= T` is the caller's to keep.
      last: int32[], which of the tokens to give the logits of.

    Returns:
      float32[B, V], the logits that follow token `last`, and the cache with the tokens in it.
    """
    hidden, cache = _run(config, params, tokens, cache, start, cache[0]["k"].dtype)
    return logits(config, params, lax.dynamic_slice_in_dim(hidden, last, 1, axis=1))[:, 0], cache


def logits(config: Config, params: Params, hidden: jax.Array) -> jax.Array:
    """hidden: float[B, S, D], after the last norm -> float32[B, S, V]."""
    return (hidden @ params.get("head", params["embed"]).mT).astype(jnp.float32)


def _run(
    config: Config,
    params: Params,
    tokens: jax.Array,
    cache: Cache | None,
    start: jax.Array,
    dtype: Any,
) -> tuple[jax.Array, Cache]:
    x = look_up(params["embed"], tokens, dtype)
    positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    angles = rope.tables(config, positions)
    new_cache = []
    for number, segment in enumerate(params["segments"]):
        x, part = _segment(config, segment, x, cache[number] if cache else None, positions, angles)
        new_cache.append(part)
    return rms_norm(x, params["norm"], config.rms_norm_eps), tuple(new_cache)


def _segment(config: Config, segment: Params, x: jax.Array, cache: Any, positions: jax.Array, angles: Any) -> Any:
    """A run of layers, under `lax.fori_loop` where it is more than one."""
    count = segment["attention_norm"].shape[0]
    sliced = jax.tree.map(lambda w: None if jaxq.is_quantized(w) else w, segment, is_leaf=jaxq.is_quantized)

    def with_stacks(layer: Params) -> Params:
        return jax.tree.map(lambda w, own: w if own is None else own, segment, layer, is_leaf=jaxq.is_quantized)

    if count == 1:
        layer = with_stacks(jax.tree.map(lambda leaf: leaf[0], sliced))
        return _layer(config, layer, x, cache, 0, positions, angles)

    # The cache is carried, not scanned over: a carried buffer is updated in place, a scanned one is copied.
    def step(number: jax.Array, carry: Any) -> Any:
        x, cache = carry
        layer = with_stacks(jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, number, keepdims=False), sliced))
        return _layer(config, layer, x, cache, number, positions, angles)

    return lax.fori_loop(0, count, step, (x, cache))


def _layer(config: Config, layer: Params, x: jax.Array, cache: Any, number: Any, positions: Any, angles: Any) -> Any:
    eps = config.rms_norm_eps
    y = rms_norm(x, layer["attention_norm"], eps)
    y, cache = _attention(config, layer, y, cache, number, positions, angles)
    x = x + y
    y = project(rms_norm(x, layer["mlp_norm"], eps), layer["gate_up"], layer.get("gate_up_bias"), number)
    return x + project(gated(y), (layer["down"],), layer.get("down_bias"), number), cache


def _attention(
    config: Config, layer: Params, x: jax.Array, cache: Any, number: Any, positions: Any, angles: Any
) -> Any:
    batch, length, _ = x.shape
    qkv = project(x, layer["qkv"], layer.get("qkv_bias"), number)
    heads = qkv.reshape(batch, length, -1, config.head_dim)
    qk, v = jnp.split(heads, (config.num_heads + config.num_kv_heads,), axis=2)
    if config.has_qk_norm:
        is_query = jnp.arange(qk.shape[2])[:, None] < config.num_heads
        qk = rms_norm(qk, jnp.where(is_query, layer["q_norm"], layer["k_norm"]), config.rms_norm_eps)
    q, k = jnp.split(rope.rotate(qk, *angles), (config.num_heads,), axis=2)
    if cache is None:
        y = attend_in_blocks(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), positions)
    else:
        y, *new = cached_attention(q, k, v, cache["k"], cache["v"], layer=number, position=positions[0])
        cache = dict(zip(("k", "v"), new, strict=True))
    return project(y.reshape(batch, length, -1), (layer["out"],), layer.get("out_bias"), number), cache


def attend_in_blocks(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, block: int = 64) -> jax.Array:
    """Attention for S = T, a block of queries at a time: what lies after a block is not computed, only to be masked."""
    parts = [
        attention(q[:, at : at + block], k[:, :, : at + block], v[:, :, : at + block], positions[at : at + block])
        for at in range(0, q.shape[1], block)
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def look_up(table: Any, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Rows of an embedding [V, D]: int[B, S] -> dtype[B, S, D]."""
    return table.take(tokens, dtype) if jaxq.is_quantized(table) else table[tokens].astype(dtype)


def project(x: jax.Array, weights: tuple[Any, ...], bias: jax.Array | None, number: Any) -> jax.Array:
    """The products with several weights `[N, K]`, side by side: float[..., K] -> float[..., sum of N].

    Of a quantized weight comes the stack of all layers, `[layers, N, K]`, and `number` tells which is meant: so the
    kernels read it where it lies. Slices of it they would get as copies, which on CPUs take longer than the product.
    """
    products = [jaxq.quantized_matmul(x, w, index=number) if jaxq.is_quantized(w) else x @ w.mT for w in weights]
    y = products[0] if len(products) == 1 else jnp.concatenate(products, axis=-1)
    return y if bias is None else y + bias.astype(y.dtype)


def gated(y: jax.Array) -> jax.Array:
    """silu(gate) * up, of float[..., 2F] with the gates first -> [..., F].

    In float32, rounded once: rounding every step, as operations on bfloat16 do, takes XLA on CPUs 2.5 times as long.
    """
    gate, up = jnp.split(y.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(y.dtype)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * weight over the last axis, in float32, in x's dtype.

    The barrier has x widened where it is read. Without it XLA on CPUs hands the whole to its library of reductions,
    which wants it widened in memory, and gives the result so.
    """
    wide = x.astype(jnp.float32)
    scale = lax.optimization_barrier(lax.rsqrt(_mean(wide * wide)[..., None] + jnp.float32(eps)))
    return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)


def _mean(x: jax.Array) -> jax.Array:
    """Over the last axis: halves are added while that leaves 32 values, the rest is summed.

    XLA on CPUs makes one loop of it, with vectors along the axis; of a plain sum three, whose calls take longer.
    """
    size = x.shape[-1]
    while x.shape[-1] % 64 == 0:
        x = sum(jnp.split(x, 2, axis=-1))
    return jnp.sum(x, axis=-1) / jnp.float32(size)
