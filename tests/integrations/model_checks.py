"""What is asked of every library model: fused products and no other, and outputs within a derived bound."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxq


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr and of those inside it."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner)


def count(jaxpr: Any) -> collections.Counter[str]:
    """How often each primitive stands in a jaxpr; a loop's body counts once."""
    return collections.Counter(eqn.primitive.name for eqn in equations(jaxpr))


def dense_sizes(jaxpr: Any) -> set[int]:
    """How many weights each `dequantize` in a jaxpr makes dense."""
    return {eqn.outvars[0].aval.size for eqn in equations(jaxpr) if eqn.primitive.name == "dequantize"}


def assert_close(
    run: Callable[[Any], jax.Array],
    dense_run: Callable[[Any], jax.Array],
    tree: Any,
    longest: int,
    unit: float = 2**-24,
) -> None:
    """The output of `run(tree)` is that of `dense_run` on the dequantized tree, up to the rounding of its products.

    A product of length K, rounded to nearest in any order of summation, is the exact product with each weight moved by
    at most gamma_K = K u / (1 - K u) of itself (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), u
    = 2**-24. To first order, such a move of all the weights w moves a functional p . y of the output by at most
    gamma_K * sum |w * d(p . y)/dw|, which one gradient of the dense model gives; the two models each move that far.
    Everything between the products (biases, norms, softmax, at most a hundred roundings in a row for the models here)
    counts as a hundred more terms, and second-order terms, a thousandth of the first at these sizes, as a doubling.
    Several random p stand for the whole output. `unit` is 2**-8 where activations are rounded to bfloat16.
    """
    dense = jaxq.dequantize_tree(tree, jnp.float32)
    inexact = lambda leaf: hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    leaves, treedef = jax.tree.flatten(dense)
    moving = [i for i, leaf in enumerate(leaves) if inexact(leaf)]

    def functional(values: list[Any], probe: jax.Array) -> tuple[jax.Array, jax.Array]:
        merged = list(leaves)
        for i, value in zip(moving, values, strict=True):
            merged[i] = value
        y = dense_run(jax.tree.unflatten(treedef, merged))
        return jnp.vdot(probe, y.astype(jnp.float32)), y

    y = run(tree)
    gamma = (longest * 2**-24 + 100 * unit) / (1 - longest * 2**-24)
    values = [leaves[i] for i in moving]
    slopes_of = jax.jit(jax.value_and_grad(functional, has_aux=True))
    for seed in range(4):
        probe = jnp.asarray(np.random.default_rng(seed).choice([-1.0, 1.0], y.shape), jnp.float32)
        (_, expected), slopes = slopes_of(values, probe)
        assert y.shape == expected.shape and y.dtype == expected.dtype
        move = sum(np.abs(np.asarray(s) * np.asarray(v)).sum() for s, v in zip(slopes, values, strict=True))
        difference = np.asarray(y, np.float64) - np.asarray(expected, np.float64)
        assert abs(np.vdot(probe, difference)) <= 2 * 2 * gamma * move
        assert move > 0
