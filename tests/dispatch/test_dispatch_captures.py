"""Weights that come in otherwise than as arguments: closures, globals, defaults, partials, methods, modules."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dispatch_checks import assert_close, bound, count, dense, normal, weight
from jax import lax

import jaxq
from jaxq import dispatch

X = normal(5, 96)
W = weight(64, 96)
SQUARE = weight(96, 96)
PARAMS = {"layer": {"w": W}}
TOLERANCE = bound(96, 2 * 96**0.5)


def fused(f, *args, times=1):
    """The result of dispatch(f), which multiplies so often fused and never makes a weight dense."""
    run = dispatch(f)
    assert count(jax.make_jaxpr(run)(*args), "quantized_matmul", "dequantize") == (times, 0)
    np.testing.assert_allclose(jax.jit(run)(*args), got := run(*args), atol=TOLERANCE)
    return got


def is_array(w):
    assert isinstance(w, jax.Array) and w.dtype == jnp.float32 and w.shape == (64, 96)
    return w


def test_variable_of_the_closure():
    w, params = W, {"w": W}
    assert_close(fused(lambda x: x @ is_array(w).T, X), X @ dense(W).T, TOLERANCE)
    assert_close(fused(lambda x: x @ is_array(params["w"]).T, X), X @ dense(W).T, TOLERANCE)


def test_global_variable():
    assert_close(fused(lambda x: x @ is_array(W).T, X), X @ dense(W).T, TOLERANCE)
    assert_close(fused(lambda x: x @ is_array(PARAMS["layer"]["w"]).T, X), X @ dense(W).T, TOLERANCE)


def test_default_arguments():
    def f(x, w=W, *, other=W):
        return x @ is_array(w).T + x @ is_array(other).T

    expected = 2 * X @ dense(W).T
    assert_close(fused(f, X, times=2), expected, 2 * TOLERANCE)
    assert_close(fused(lambda x, w: f(x, w, other=w), X, W, times=2), expected, 2 * TOLERANCE)


def test_partial():
    assert_close(fused(functools.partial(lambda w, x: x @ is_array(w).T, W), X), X @ dense(W).T, TOLERANCE)
    assert_close(fused(functools.partial(lambda x, w: x @ is_array(w).T, w=W), X), X @ dense(W).T, TOLERANCE)
    assert_close(fused(jax.tree_util.Partial(lambda w, x: x @ is_array(w).T, W), X), X @ dense(W).T, TOLERANCE)


class Layer:
    def __init__(self, w):
        self.w = w

    def __call__(self, x):
        return x @ self.w.T

    def flipped(self, x):
        return x @ self.w


def test_object_that_is_no_pytree():
    """The weight is met as a QuantizedArray, whose operators JAX's functions turn into the same products."""
    assert_close(fused(Layer(W), X), X @ dense(W).T, TOLERANCE)
    assert_close(fused(Layer(W.T).flipped, X), X @ dense(W).T, TOLERANCE)


def test_function_that_the_function_calls():
    """Its variables are not looked into; jax.numpy and operators take the weight all the same."""

    def inner(x):
        return jnp.einsum("bi,oi->bo", x, W)

    assert_close(fused(lambda x: inner(x), X), X @ dense(W).T, TOLERANCE)
    assert_close(fused(jax.jit(inner), X), X @ dense(W).T, TOLERANCE)

    def body(c, _):
        return (jnp.tanh(c @ SQUARE.T), None)

    got = fused(lambda x: lax.scan(body, x, None, length=2)[0], X)
    assert_close(got, lax.scan(lambda c, _: (jnp.tanh(c @ dense(SQUARE).T), None), X, None, length=2)[0], 8 * TOLERANCE)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w + 1.0,
        lambda w: 2.0 * w,
        lambda w: -w,
        lambda w: w.reshape(32, 192),
        lambda w: w.sum(axis=0),
        lambda w: w > 0,
        lambda w: jnp.abs(w),
        lambda w: lax.mul(jnp.asarray(w), jnp.asarray(w)),
    ],
)
def test_other_uses_of_a_captured_weight(use):
    """Arithmetic and methods of arrays work while dispatch traces, and not outside of it."""
    hidden = Layer(W)
    np.testing.assert_allclose(dispatch(lambda: use(hidden.w))(), use(dense(W)), rtol=1e-5, atol=1e-5)
    with pytest.raises((TypeError, AttributeError), match="dispatch"):
        use(W)


def test_the_function_is_not_changed():
    w = W
    calls = 0

    def f(x):
        nonlocal calls
        calls += 1
        return x @ w.T

    dispatch(f)(X)
    assert calls == 1 and w is W and f.__closure__[1].cell_contents is W
    assert jaxq.is_quantized(PARAMS["layer"]["w"])


def test_captured_under_jit_does_not_leak():
    """A function traced by dispatch and then called outside of it, or the other way round, is traced anew."""

    @jax.jit
    def inner(x):
        return x @ W.T

    expected = X @ dense(W).T
    for call in (inner, dispatch(inner), inner, dispatch(inner)):
        assert_close(call(X), expected, TOLERANCE)


def test_gradient_with_respect_to_captured_activations():
    got = jax.jit(jax.grad(dispatch(lambda x: jnp.sum(jnp.sin(x @ W.T)))))(X)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(x @ dense(W).T)))(X)
    assert_close(got, expected, 16 * TOLERANCE)
