"""Quantize a Flax model in one line: `python examples/flax_transformer.py`.

A small transformer of `flax.nnx` layers learns to continue the source of Python's standard library, byte by byte, and
is then run as it was, on weights of 8 and 4 bits. Prints what each occupies, its loss on files that it has not seen,
and how long it takes.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sysconfig
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import median_times
from flax import nnx

import jaxq
import jaxq.integrations.flax

LENGTH = 64
BATCH = 16
FORMATS = {"int8": jaxq.QuantSpec(8, 64), "int4": jaxq.QuantSpec(4, 64)}


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(width // 64, width, decode=False, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
    """uint8[batch, length] -> float32[batch, length, 256], the logits of the next byte."""

    def __init__(self, width: int, depth: int, rngs: nnx.Rngs):
        self.bytes = nnx.Embed(256, width, rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (LENGTH, width)) * 0.02)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(depth)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        x = self.bytes(text) + self.positions[...]
        mask = nnx.make_causal_mask(text)
        for block in self.blocks:
            x = block(x, mask)
        return self.bytes.attend(self.norm(x))


def load() -> tuple[np.ndarray, np.ndarray]:
    """The standard library's modules as bytes: some to learn from, others to test with."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [np.frombuffer(file.read_bytes(), np.uint8) for file in files]
    return np.concatenate(texts[::2]), np.concatenate(texts[1::2])


def batches(text: np.ndarray, count: int, seed: int) -> list[jax.Array]:
    """uint8[BATCH, LENGTH + 1] each, from random places."""
    starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH - 1, (count, BATCH))
    return [jnp.asarray(np.stack([text[s : s + LENGTH + 1] for s in row])) for row in starts]


def loss(model: Transformer, text: jax.Array) -> jax.Array:
    """Mean cross-entropy per byte, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(model(text[:, :-1]), text[:, 1:].astype(int)).mean()


def train(model: Transformer, text: np.ndarray, steps: int) -> None:
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        optimizer.update(model, nnx.grad(loss)(model, batch))

    for batch in batches(text, steps, 0):
        step(model, optimizer, batch)


def compiled(model: Transformer, text: jax.Array) -> Callable[[], jax.Array]:
    """The model on one text, compiled; `nnx.jit` would do, but looks at every variable at each call."""
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, text: nnx.merge(graph, state)(text)).lower(state, text).compile()
    return functools.partial(run, state, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256, help="width of the model, a multiple of 64")
    parser.add_argument("--depth", type=int, default=2, help="how many blocks")
    parser.add_argument("--steps", type=int, default=60, help="steps of training")
    parser.add_argument("--rounds", type=int, default=20, help="how often each model is timed")
    args = parser.parse_args()
    text, unseen = load()
    model = Transformer(args.width, args.depth, nnx.Rngs(0))
    train(model, text, args.steps)

    models = {"float32": model}
    for name, spec in FORMATS.items():
        report = jaxq.Report()
        models[name] = jaxq.integrations.flax.quantize(nnx.clone(model), spec, report=report)  # all that changes
    print(report, end="\n\n")

    prompt, test = batches(unseen, 1, 1)[0][:1, :LENGTH], nnx.jit(loss)
    times = median_times({name: compiled(m, prompt) for name, m in models.items()}, args.rounds)
    print(f"{'format':8} {'bytes':>11} {'loss':>7} {f'ms per {LENGTH} bytes':>16}")
    for name, m in models.items():
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(m)))
        value = float(np.mean([test(m, batch) for batch in batches(unseen, 4, 2)]))
        print(f"{name:8} {size:11,} {value:7.4f} {times[name]:16.3f}")
    print("\nLoss: nats per byte of files that the model has not seen; log(256), of a blind guess, is 5.545.")


if __name__ == "__main__":
    main()
