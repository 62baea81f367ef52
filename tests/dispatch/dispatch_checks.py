"""Comparing a dispatched function with the same function on dequantized weights, and counting what it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import jaxq

GROUP = 16


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    """Rows of a norm near sqrt of their length."""
    values = np.random.default_rng(seed + sum(shape)).normal(size=shape)
    return jnp.asarray(values.astype(np.float32).astype(np.dtype(dtype)))


def weight(*shape: int, axis: Any = -1, bits: int = 4, seed: int = 1, dtype: Any = jnp.float32) -> jaxq.QuantizedArray:
    """A random quantized weight whose vectors along the grouped axis have a norm near 1. Made without compiling."""
    axes = tuple(a % len(shape) for a in ((axis,) if isinstance(axis, int) else axis))
    storage = [shape[a] for a in range(len(shape)) if a not in axes] + [shape[a] for a in axes]
    *lead, length = storage
    rng = np.random.default_rng(seed + sum(shape))
    packed = rng.integers(0, 2**32, (*lead, length * bits // 32), dtype=np.uint32)
    # Codes are uniform in [0, 2**bits): a standard deviation of 2**bits / sqrt(12), up to rounding.
    scales = np.sqrt(12 / length) / 2**bits * rng.uniform(0.8, 1.2, (*lead, length // GROUP))
    scales = scales.astype(np.dtype(dtype))
    biases = (-scales * (2**bits - 1) / 2).astype(np.dtype(dtype))
    leaves = [jnp.asarray(leaf) for leaf in (packed, scales, biases)]
    return jaxq.QuantizedArray.from_packed(*leaves, bits=bits, group_size=GROUP, axis=axis)


def decode(qw: jaxq.QuantizedArray) -> jax.Array:
    """What a weight stands for, by NumPy in float64, rounded once to the dtype that it dequantizes to."""
    biases = None if qw.biases is None else np.asarray(qw.biases)
    leaves = np.asarray(qw.packed), np.asarray(qw.scales), biases
    w = oracle.dequantize(*leaves, bits=qw.bits, group_size=qw.group_size, mode=qw.mode)
    last = [axis % qw.ndim for axis in qw.axis]
    order = [axis for axis in range(qw.ndim) if axis not in last] + last
    return jnp.asarray(w.transpose(np.argsort(order)).astype(qw.float_dtype))


def dense(tree: Any) -> Any:
    """The tree with its weights dequantized."""
    return jax.tree.map(lambda x: decode(x) if jaxq.is_quantized(x) else x, tree, is_leaf=jaxq.is_quantized)


def count(jaxpr: Any, *names: str) -> tuple[int, ...]:
    """How many equations of each name a jaxpr holds, those of its nested jaxprs counted once."""
    found: dict[str, int] = {}

    def walk(jaxpr: Any) -> None:
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            found[eqn.primitive.name] = found.get(eqn.primitive.name, 0) + 1
            for value in eqn.params.values():
                for item in value if isinstance(value, list | tuple) else (value,):
                    if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                        walk(item)

    walk(jaxpr)
    return tuple(found.get(name, 0) for name in names)


def counts(f: Callable[..., Any], *args: Any) -> dict[str, int]:
    """How often the function multiplies fused, makes a weight dense (or rows of it), and multiplies dense."""
    fused, made_dense, dots = count(jax.make_jaxpr(f)(*args), "quantized_matmul", "dequantize", "dot_general")
    return {"fused": fused, "dense": made_dense, "dots": dots}


def bound(length: int, amplitude: float, products: int = 1, dtype: Any = jnp.float32) -> float:
    """How far two evaluations of a chain of dots may be apart.

    A dot of `length` terms, summed in any order in float32, is off by at most length * eps32 * sum |x||w|, and that
    sum is at most `amplitude`, |x| * |w| (Cauchy-Schwarz). In a narrower dtype both x and w were rounded to it in the
    dense model and not all of them in the fused one, and the results are, once each: 3 * eps more. Both evaluations
    err, so twice that; and what follows a dot in these tests stretches distances by at most 2.
    """
    eps = float(jnp.finfo(dtype).eps) if jnp.dtype(dtype) != jnp.float32 else 0.0
    return 2 * 2 * products * (length * float(jnp.finfo(jnp.float32).eps) + 3 * eps) * amplitude


def assert_close(got: Any, expected: Any, tolerance: float) -> None:
    """Every float leaf within the bound, everything else equal; the same shapes and dtypes."""
    got, expected = dense(got), dense(expected)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if not isinstance(e, jax.Array | np.ndarray):
            assert g == e
            continue
        assert g.shape == e.shape and g.dtype == e.dtype, (g.shape, g.dtype, e.shape, e.dtype)
        if jnp.issubdtype(e.dtype, jnp.floating):
            assert np.isfinite(np.asarray(e, np.float64)).all()
            np.testing.assert_allclose(np.asarray(g, np.float64), np.asarray(e, np.float64), rtol=0, atol=tolerance)
        elif e.dtype != jax.dtypes.float0 and not jnp.issubdtype(e.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(g, e)


def check(
    f: Callable[..., Any],
    *args: Any,
    fused: int,
    dense_weights: int = 0,
    dots: int | None = 0,
    reference: Callable[..., Any] | None = None,
    transform: Callable[..., Any] = jaxq.dispatch,
    tolerance: float | None = None,
    products: int = 1,
    eager: bool = False,
) -> None:
    """`transform(f)(*args)`, under jit and, if `eager`, outside of it, agrees with `reference` on dense weights, and
    multiplies fused `fused` times, makes `dense_weights` weights dense, and multiplies dense `dots` times."""
    run = transform(f)
    found = counts(run, *args)
    expected_counts = {"fused": fused, "dense": dense_weights, "dots": found["dots"] if dots is None else dots}
    assert found == expected_counts, f"{found}, not {expected_counts}"
    tolerance = default_tolerance(args, products) if tolerance is None else tolerance
    # Both in one program: compiling is what takes the time here.
    got, expected = jax.jit(lambda args, dense_args: (run(*args), (reference or f)(*dense_args)))(args, dense(args))
    assert_close(got, expected, tolerance)
    if eager:
        assert_close(run(*args), expected, tolerance)


def default_tolerance(args: Any, products: int) -> float:
    """The bound from the arguments: the longest axis there is, and the largest norm of x times that of w (1, or less
    than 2 with what quantization adds), vectors taken along the last axis."""
    arrays = [a for a in jax.tree.leaves(dense(args)) if jnp.issubdtype(a.dtype, jnp.floating) and a.ndim]
    length = max(max(a.shape) for a in arrays)
    amplitude = max(float(np.linalg.norm(np.asarray(a, np.float64), axis=-1).max()) for a in arrays)
    narrow = max((a.dtype for a in arrays), key=lambda dtype: float(jnp.finfo(dtype).eps))
    return bound(length, 2 * max(amplitude, 1.0), products, narrow)
