"""What dispatch costs while a model is traced and lowered: a transformer of 24 layers and 168 products.

    python benchmarks/dispatch.py [--repeats N]

Times `jax.jit(f).lower(...)`, with JAX's caches cleared each time, of the dense model and of the dispatched one on
quantized weights, in turns, and prints the medians and the median of the ratios of neighbours. Nothing is compiled or
run: what XLA does with the result is the same program each time the model runs.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxq

LAYERS, WIDTH, HIDDEN, HEADS, LENGTH = 24, 64, 128, 4, 8


def layer(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    """Attention and a gated feed-forward part: seven products with weights."""
    h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    q, k, v = (jnp.reshape(h @ w[name].T, (LENGTH, HEADS, -1)) for name in ("q", "k", "v"))
    scores = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k))
    x = x + jnp.einsum("hqk,khd->qhd", scores, v).reshape(LENGTH, WIDTH) @ w["o"].T
    h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x + (jax.nn.silu(h @ w["gate"].T) * (h @ w["up"].T)) @ w["down"].T


def weights(make: Callable[[int, int], Any]) -> list[dict[str, Any]]:
    shapes = {name: (WIDTH, WIDTH) for name in ("q", "k", "v", "o")}
    shapes |= {"gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}
    return [{name: make(*shape) for name, shape in shapes.items()} for _ in range(LAYERS)]


def quantized(rows: int, length: int) -> jaxq.QuantizedArray:
    groups = np.ones((rows, length // 32), np.float32)
    return jaxq.QuantizedArray.from_packed(
        jnp.zeros((rows, length // 8), jnp.uint32), jnp.asarray(groups), jnp.asarray(groups), bits=4, group_size=32
    )


def models() -> dict[str, Callable[..., jax.Array]]:
    def unrolled(x: jax.Array, layers: list[Any]) -> jax.Array:
        for w in layers:
            x = layer(x, w)
        return x

    def jitted(x: jax.Array, layers: list[Any]) -> jax.Array:
        step = jax.jit(layer)
        for w in layers:
            x = step(x, w)
        return x

    def scanned(x: jax.Array, layers: Any) -> jax.Array:
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, layers)[0]

    return {"unrolled": unrolled, "inner jit": jitted, "scan": scanned}


def seconds(f: Callable[..., Any], *args: Any) -> float:
    jax.clear_caches()
    gc.collect()
    start = time.perf_counter()
    jax.jit(f).lower(*args)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    x = jnp.ones((LENGTH, WIDTH))
    dense, packed = weights(lambda *shape: jnp.zeros(shape)), weights(quantized)

    def stack(layers):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    print(f"jax {jax.__version__}, {LAYERS} layers, {LAYERS * 7} products, {repeats} repeats; milliseconds to lower")
    print(f"{'model':10} {'dense':>8} {'dispatch':>8} {'ratio':>6}")
    for name, f in models().items():
        args = [(x, stack(w) if name == "scan" else w) for w in (dense, packed)]
        runs = ((f, args[0]), (jaxq.dispatch(f), args[1]))
        for run, arguments in runs:
            seconds(run, *arguments)
        times = [[seconds(run, *arguments) for run, arguments in runs] for _ in range(repeats)]
        medians = [1e3 * statistics.median(column) for column in zip(*times, strict=True)]
        ratio = statistics.median(fast / slow for slow, fast in times)
        print(f"{name:10} {medians[0]:8.1f} {medians[1]:8.1f} {ratio:6.2f}")


if __name__ == "__main__":
    main()
