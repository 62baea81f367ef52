"""Text from a model: the prompt in one program, then tokens in another, over one cache that both reuse in place."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from examples.llm import memory, model
from examples.llm.config import Config
from examples.llm.sampling import Sampling, choose

# A prompt runs in pieces of at most this many tokens; the last is padded to a multiple of PAD_TO, so that prompts of
# many lengths share few programs.
PIECE = 512
PAD_TO = 64

extend = jax.jit(model.extend, static_argnums=0, donate_argnames="cache")


@functools.partial(jax.jit, static_argnums=0, static_argnames=("count", "sampling"), donate_argnames="cache")
def decode(
    config: Config,
    params: model.Params,
    token: jax.Array,
    cache: model.Cache,
    position: jax.Array,
    key: jax.Array,
    *,
    count: int,
    sampling: Sampling,
) -> tuple[jax.Array, model.Cache]:
    """`count` tokens, one after the other, in one program.

    Args:
      token: int32[B], the last one known, not in the cache yet.
      position: int32[], where it stands: how many tokens the cache holds.
      key: for sampling; every position draws with its own.

    Returns:
      int32[count, B], the tokens that follow, and the cache with all but the last of them in it.
    """

    def step(carry: Any, _: Any) -> Any:
        token, cache, at = carry
        logits, cache = model.extend(config, params, token[:, None], cache, at, jnp.int32(0))
        token = choose(logits, sampling, jax.random.fold_in(key, at))
        return (token, cache, at + 1), token

    # The cache is carried, so that each step updates it where it lies.
    (_, cache, _), tokens = lax.scan(step, (token, cache, position), length=count)
    return tokens, cache


def prefill(
    config: Config, params: model.Params, prompt: np.ndarray, cache: model.Cache
) -> tuple[jax.Array, model.Cache]:
    """A whole prompt, int[B, S] with S > 0, into an empty cache: float32[B, V] logits that follow it, and the cache."""
    length = prompt.shape[1]
    room = cache[0]["k"].shape[3]
    if length == 0 or padded(length) > room:
        raise ValueError(f"prefill: prompt.shape={prompt.shape} needs a cache of {padded(length)}, and it has {room}")
    tokens = np.pad(np.asarray(prompt, np.int32), ((0, 0), (0, padded(length) - length)))
    logits = None
    for start in range(0, tokens.shape[1], PIECE):
        piece = jnp.asarray(tokens[:, start : start + PIECE])
        last = jnp.int32(min(length - start, piece.shape[1]) - 1)
        logits, cache = extend(config, params, piece, cache=cache, start=jnp.int32(start), last=last)
    assert logits is not None
    return logits, cache


def padded(length: int) -> int:
    """The cache that a prompt of this many tokens needs."""
    return math.ceil(length / PAD_TO) * PAD_TO


def generate(
    config: Config,
    params: model.Params,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    dtype: Any = jnp.bfloat16,
    at_once: int = 16,
) -> Iterator[int]:
    """Tokens that continue a prompt, as they come, until one of `config.eos_ids` or `max_tokens`.

    Args:
      prompt: token ids, at least one.
      at_once: tokens per call of the program. More of them share the cost of the call, and come in larger bursts.
    """
    sampling = sampling or Sampling()
    key = jax.random.key(seed)
    length = padded(max(padded(len(prompt)), len(prompt) + max_tokens + at_once))
    cache = model.init_cache(config, params, batch=1, length=length, dtype=dtype)
    logits, cache = prefill(config, params, np.asarray([prompt]), cache)
    token = choose(logits, sampling, jax.random.fold_in(key, len(prompt) - 1))
    tokens = np.asarray(token)[None]
    position = len(prompt)
    sent, first = 0, True
    while True:
        for value in tokens[:, 0].tolist():
            if value in config.eos_ids or sent >= max_tokens:
                return
            yield value
            sent += 1
        if sent >= max_tokens:
            return
        new, cache = decode(
            config, params, token, cache=cache, position=jnp.int32(position), key=key, count=at_once, sampling=sampling
        )
        token, tokens, position = new[-1], np.asarray(new), position + at_once
        if first:
            memory.release()
            first = False  # both programs are compiled now


@functools.partial(jax.jit, static_argnums=0, static_argnames="dtype")
def _window_loss(config: Config, params: model.Params, tokens: jax.Array, dtype: Any) -> jax.Array:
    logits = model.forward(config, params, tokens[:, :-1], dtype)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def cross_entropy(config: Config, params: model.Params, windows: np.ndarray, *, dtype: Any, batch: int = 8) -> float:
    """Mean nats per token over windows of text, int[count, S + 1], each predicted from its own beginning on."""
    count = len(windows) // batch * batch
    if not count:
        raise ValueError(f"cross_entropy: {len(windows)} windows are fewer than batch={batch}")
    parts = np.split(np.asarray(windows[:count], np.int32), count // batch)
    return float(np.mean([float(_window_loss(config, params, jnp.asarray(part), dtype=dtype)) for part in parts]))
