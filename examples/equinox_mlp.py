"""Quantize an Equinox model in one line: `python examples/equinox_mlp.py`.

An `eqx.nn.MLP` learns scikit-learn's handwritten digits, and is then run as it was, on weights of 8, 4 and 3 bits.
Prints what each occupies, how many of the test images it gets right, and how long it takes.
"""

from __future__ import annotations

import argparse
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from digits import load, median_times

import jaxq
import jaxq.integrations.equinox

BATCH = 128
FORMATS = {"int8": jaxq.QuantSpec(8, 64), "int4": jaxq.QuantSpec(4, 64), "int3": jaxq.QuantSpec(3, 64)}


def train(model: eqx.Module, images: jax.Array, labels: jax.Array, steps: int) -> eqx.Module:
    """Adam on the mean cross-entropy of random batches."""
    optimizer = optax.adam(1e-3)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_value_and_grad
    def loss(model, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()

    @eqx.filter_jit(donate="all-except-first")
    def step(data, model, state):
        value, grads = loss(model, *data)
        updates, state = optimizer.update(grads, state)
        return eqx.apply_updates(model, updates), state, value

    for batch in jax.random.randint(jax.random.key(1), (steps, BATCH), 0, len(labels)):
        model, state, _ = step((images[batch], labels[batch]), model, state)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024, help="width of the two hidden layers")
    parser.add_argument("--steps", type=int, default=100, help="steps of training")
    parser.add_argument("--rounds", type=int, default=40, help="how often each model is timed")
    args = parser.parse_args()
    images, labels, test_images, test_labels = load()
    model = eqx.nn.MLP(64, 10, args.width, 2, key=jax.random.key(0))
    model = train(model, images, labels, args.steps)

    models = {"float32": model}
    for name, spec in FORMATS.items():
        models[name] = jaxq.integrations.equinox.quantize(model, spec)  # all that changes

    run = eqx.filter_jit(lambda model, x: jax.vmap(model)(x))
    batch = test_images[:8]
    times = median_times({name: functools.partial(run, m, batch) for name, m in models.items()}, args.rounds)
    print(f"{'format':8} {'bytes':>11} {'accuracy':>9} {'difference':>11} {'ms per batch of 8':>18}")
    dense = run(model, test_images)
    for name, m in models.items():
        logits = run(m, test_images)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(m, eqx.is_array)))
        right = float((logits.argmax(-1) == test_labels).mean())
        difference = float(jnp.linalg.norm(logits - dense) / jnp.linalg.norm(dense))
        print(f"{name:8} {size:11,} {right:9.2%} {difference:11.2%} {times[name]:18.3f}")
    print("\nDifference: the norm of (logits - dense logits) over that of the dense ones, on 360 test images.")


if __name__ == "__main__":
    main()
