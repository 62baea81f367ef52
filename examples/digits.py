"""Train a small network on scikit-learn's handwritten digits, quantize it, and compare: `python examples/digits.py`.

The network is a plain JAX function. It runs unchanged on dense and on quantized weights, because both multiply as
`x @ w.T`. Prints one table and saves a plot of it beside this file.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import jaxq

WIDTHS = (64, 1024, 1024, 10)  # 64 pixels in, ten digits out
BATCH = 128
FORMATS = {
    "int8": jaxq.QuantSpec(8, 64),
    "int4": jaxq.QuantSpec(4, 64),
    "int3": jaxq.QuantSpec(3, 64),
    "int2": jaxq.QuantSpec(2, 64),
    "mxfp4": jaxq.QuantSpec(mode="mxfp4"),
    "nvfp4": jaxq.QuantSpec(mode="nvfp4"),
}
Params = list[dict[str, Any]]


def network(params: Params, x: jax.Array) -> jax.Array:
    """x: float32[batch, 64] -> float32[batch, 10], the logits. A layer's weight is [out, in], dense or quantized."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["weight"].T + layer["bias"])
    return x @ params[-1]["weight"].T + params[-1]["bias"]


def load() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Training images and labels, test images and labels: 1437 and 360 of them, pixels in [0, 1]."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = jnp.asarray(digits.data[order] / 16, jnp.float32), jnp.asarray(digits.target[order])
    return images[:-360], labels[:-360], images[-360:], labels[-360:]


def train(images: jax.Array, labels: jax.Array, epochs: int) -> Params:
    """Adam (Kingma and Ba, 2015) on the mean cross-entropy, in minibatches of BATCH."""
    keys = jax.random.split(jax.random.key(0), len(WIDTHS))
    params = [
        {"weight": jax.random.normal(key, (n, k)) * (2 / k) ** 0.5, "bias": jnp.zeros(n)}
        for key, k, n in zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=False)
    ]

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(network(params, x)), y[:, None], axis=-1).mean()

    def step(state: Any, batch: jax.Array) -> tuple[Any, None]:
        params, mean, square, t = state
        grads = jax.grad(loss)(params, images[batch], labels[batch])
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
        square = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, square, grads)
        rate = 1e-3 * jnp.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        params = jax.tree.map(lambda p, m, s: p - rate * m / (jnp.sqrt(s) + 1e-8), params, mean, square)
        return (params, mean, square, t + 1), None

    steps = len(images) // BATCH
    orders = [jax.random.permutation(key, len(images))[: steps * BATCH] for key in jax.random.split(keys[-1], epochs)]
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = (params, zeros, zeros, jnp.float32(1))
    (params, *_), _ = jax.jit(functools.partial(jax.lax.scan, step))(state, jnp.stack(orders).reshape(-1, BATCH))
    return params


def quantize(params: Params, spec: jaxq.QuantSpec) -> Params:
    """Every weight quantized along its inputs; the biases stay as they are."""
    options: dict[str, Any] = {"bits": spec.bits, "group_size": spec.group_size, "mode": spec.mode}
    return [layer | {"weight": jaxq.quantize(layer["weight"], **options)} for layer in params]


def nbytes(params: Params) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def worst_error(params: Params, quantized: Params) -> float:
    """The largest error of any weight, relative to the largest weight of its layer."""
    pairs = [(a["weight"], jaxq.dequantize(b["weight"], jnp.float32)) for a, b in zip(params, quantized, strict=True)]
    return max(float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in pairs)


def usable() -> list[str]:
    """The implementations that run here, the default one first."""
    table = jaxq.implementations()
    row = table.get(jax.default_backend(), table["other"])
    names = [name for name, state in row.items() if state in ("default", "usable")]
    return sorted(names, key=lambda name: row[name] != "default")


def median_times(functions: dict[Any, Callable[[], jax.Array]], rounds: int) -> dict[Any, float]:
    """Median milliseconds of each function. They take turns, so that a busy machine slows all of them alike."""
    samples: dict[Any, list[float]] = {key: [] for key in functions}
    for _ in range(rounds):
        for key, function in functions.items():
            start = time.perf_counter()
            function().block_until_ready()
            samples[key].append((time.perf_counter() - start) * 1e3)
    return {key: statistics.median(values) for key, values in samples.items()}


def compiled(name: str | None, params: Params, x: jax.Array) -> Callable[[], jax.Array]:
    """The network in jit, compiled for one implementation, on these weights and images."""
    with jaxq.use_implementation(name):
        function = jax.jit(network).lower(params, x).compile()
    return functools.partial(function, params, x)


def compare(params: Params, images: jax.Array, labels: jax.Array, size: int, rounds: int) -> list[dict[str, Any]]:
    """One row per format, the dense network first; timed on batches of `size` images."""
    models = {"float32": params} | {name: quantize(params, spec) for name, spec in FORMATS.items()}
    names = usable()
    batch = images[:size]
    functions = {("float32", "dense"): compiled(None, params, batch)}
    functions |= {(fmt, name): compiled(name, models[fmt], batch) for fmt in FORMATS for name in names}
    for function in functions.values():
        function().block_until_ready()
    times = median_times(functions, rounds)
    dense = times.pop(("float32", "dense"))
    rows = []
    for fmt, model in models.items():
        right = jax.jit(network)(model, images).argmax(-1) == labels
        row = {"format": fmt, "bytes": nbytes(model), "error": 0.0, "accuracy": float(right.mean())}
        if fmt in FORMATS:
            row["error"] = worst_error(params, model)
            row |= {name: times[fmt, name] for name in names}
        rows.append(row | {"dense": dense})
    return rows


def show(rows: list[dict[str, Any]], size: int) -> None:
    names = usable()
    print(f"\nMilliseconds per batch of {size} inside jit, and their ratio to the dense network's:")
    print(f"{'format':8} {'bytes':>10} {'worst error':>12} {'accuracy':>9}", *(f"{name:>16}" for name in names))
    for row in rows:
        line = f"{row['format']:8} {row['bytes']:10,} {row['error']:12.2%} {row['accuracy']:9.2%}"
        if row["format"] in FORMATS:
            cells = [f"{row[name]:8.2f} ({row[name] / row['dense']:4.2f}x)" for name in names]
        else:
            cells = [f"{row['dense']:8.2f} (dense)"]
        print(line, *(f"{cell:>16}" for cell in cells))
    print("\nWorst error: the largest error of a weight, relative to the largest weight of its layer.")
    print(f"Accuracy: of 360 test images, on the default implementation, which is {names[0]!r} here.")


def plot(rows: list[dict[str, Any]], size: int, path: pathlib.Path) -> None:
    """Accuracy against size, and time by format; written aside and renamed, so that `path` is never half a file."""
    names = usable()
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in rows:
        left.plot(row["bytes"] / 1e6, row["accuracy"] * 100, "o", color="#0072b2")
        point = (row["bytes"] / 1e6, row["accuracy"] * 100)
        left.annotate(row["format"], point, (0, 7), textcoords="offset points", rotation=60)
    left.set(xscale="log", xlabel="size, MB", ylabel="accuracy on the test images, %", title="Quality against size")
    left.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    left.minorticks_off()
    left.margins(0.2, 0.35)
    left.grid(alpha=0.3)
    width = 0.8 / len(names)
    for i, (name, color) in enumerate(zip(names, ("#0072b2", "#e69f00", "#009e73", "#cc79a7"), strict=False)):
        positions = [j + (i - (len(names) - 1) / 2) * width for j in range(len(FORMATS))]
        right.bar(positions, [row[name] for row in rows if row["format"] in FORMATS], width, label=name, color=color)
    right.axhline(rows[0]["dense"], color="black", linestyle="--", label="dense float32")
    right.set_xticks(range(len(FORMATS)), FORMATS)
    right.set(yscale="log", ylabel=f"milliseconds per batch of {size}", title="Time in jit")
    right.legend()
    aside = path.with_name(f"{path.stem}.part{path.suffix}")
    figure.savefig(aside, dpi=120)
    os.replace(aside, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training images")
    parser.add_argument("--batch", type=int, default=8, help="how many images are classified at a time")
    parser.add_argument("--rounds", type=int, default=15, help="how often each function is timed")
    parser.add_argument("--plot", type=pathlib.Path, default=pathlib.Path(__file__).with_suffix(".png"))
    args = parser.parse_args()
    images, labels, test_images, test_labels = load()
    print(f"Training {'-'.join(map(str, WIDTHS))} on {len(images)} images of digits ...", flush=True)
    start = time.perf_counter()
    params = jax.block_until_ready(train(images, labels, args.epochs))
    print(f"  {args.epochs} epochs in {time.perf_counter() - start:.1f} s. Quantizing and timing ...", flush=True)
    rows = compare(params, test_images, test_labels, args.batch, args.rounds)
    show(rows, args.batch)
    plot(rows, args.batch, args.plot)
    print(f"Plot: {args.plot}")


if __name__ == "__main__":
    main()
