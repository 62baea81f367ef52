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
    run: Callable[[Any], jax.Array], dense_run: Callable[[Any], jax.Array], tree: Any, longest: int
) -> None:
    """The output of `run(tree)` is that of `dense_run` on the dequantized tree, up to the rounding of its products.

    The two differ in how their products with weights are summed. A float32 sum of K terms is, in any order, the exact
    sum with every term moved by a relative delta of at most lambda * sqrt(K) * u, u = 2**-24, but with a probability of
    2 exp(-lambda**2 / 2) (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019, theorem 2.4);
    lambda = 4 makes that 7e-4. To move the terms w[i, j] x[j] of output i is to move w[i, j], so a functional p . y of
    the model's output moves, to first order, by at most delta * sum_j |w[i, j] d(p . y)/dw[i, j]|, which one gradient
    of the dense model gives. Outputs i round independently of each other, so their moves add as squares do.
    Both models move that far: twice. What else rounds between two products (biases, norms, softmax) is at most as much
    as the products here do, and is done alike in both models: twice again.
    Several random p stand for the whole output; `longest` is the K of the longest product.
    """
    dense = jaxq.dequantize_tree(tree, jnp.float32)
    axes = [leaf.axis if jaxq.is_quantized(leaf) else None for leaf in jax.tree.leaves(tree, is_leaf=jaxq.is_quantized)]
    leaves, treedef = jax.tree.flatten(dense)
    moving = [i for i, axis in enumerate(axes) if axis is not None]

    def functional(values: list[Any], probe: jax.Array) -> tuple[jax.Array, jax.Array]:
        merged = list(leaves)
        for i, value in zip(moving, values, strict=True):
            merged[i] = value
        y = dense_run(jax.tree.unflatten(treedef, merged))
        return jnp.vdot(probe, y.astype(jnp.float32)), y

    y = run(tree)
    delta = 4 * np.sqrt(longest) * 2**-24
    values = [leaves[i] for i in moving]
    slopes_of = jax.jit(jax.value_and_grad(functional, has_aux=True))
    for seed in range(4):
        probe = jnp.asarray(np.random.default_rng(seed).choice([-1.0, 1.0], y.shape), jnp.float32)
        (_, expected), slopes = slopes_of(values, probe)
        assert y.shape == expected.shape and y.dtype == expected.dtype
        moves = [
            np.abs(np.asarray(slope) * np.asarray(value)).sum(axes[i])
            for i, slope, value in zip(moving, slopes, values, strict=True)
        ]
        move = np.sqrt(sum((m.astype(np.float64) ** 2).sum() for m in moves))
        difference = np.asarray(y, np.float64) - np.asarray(expected, np.float64)
        assert abs(np.vdot(probe, difference)) <= 2 * 2 * delta * move
        assert move > 0
