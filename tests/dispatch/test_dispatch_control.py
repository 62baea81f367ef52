"""Nested jaxprs: weights go into jit, loops, branches, checkpoints and custom derivatives in quantized form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from dispatch_checks import check, dense, normal, weight
from jax import lax

import jaxq

X = normal(5, 96)
W = weight(64, 96)
SQUARE = weight(96, 96)
LAYERS = weight(3, 96, 96, axis=-2)


def layer(x, w):
    return jax.nn.relu(x @ w)


def closure(x, w, *, steps=3):
    return lax.scan(lambda c, _: (jnp.tanh(c @ w.T), None), x, None, length=steps)[0]


CONTROL = {
    "jit": (jax.jit(lambda x, w: jax.nn.silu(x @ w.T)), SQUARE, 1),
    "jit, transposed outside": (lambda x, w: jax.jit(lambda x, w: x @ w)(x, w.T), SQUARE, 1),
    "jit in jit": (jax.jit(lambda x, w: jax.jit(lambda x, w: x @ w.T)(x, w) + 1), SQUARE, 1),
    "jit, not inlined": (jax.jit(lambda x, w: x @ w.T, inline=True), SQUARE, 1),
    "checkpoint": (jax.checkpoint(lambda x, w: jnp.sin(x @ w.T)), SQUARE, 1),
    "scan over weights": (lambda x, w: lax.scan(lambda c, w: (layer(c, w), c.sum()), x, w), LAYERS, 1),
    "scan, reversed and unrolled": (
        lambda x, w: lax.scan(lambda c, w: (layer(c, w), None), x, w, reverse=True, unroll=3)[0],
        LAYERS,
        1,
    ),
    "scan over another axis": (
        lambda x, w: lax.scan(lambda c, w: (layer(c, w), None), x, w.transpose(1, 0, 2))[0],
        weight(96, 3, 96, axis=0),
        1,
    ),
    "scan of a checkpoint": (
        lambda x, w: lax.scan(jax.checkpoint(lambda c, w: (layer(c, w), None)), x, w)[0],
        LAYERS,
        1,
    ),
    "scan with a constant weight": (closure, SQUARE, 1),
    "scan with a weight as carry": (
        lambda x, w: lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1].T), c[1]), None), (x, w), None, length=3)[0][0],
        SQUARE,
        1,
    ),
    "scan that returns its weights": (lambda x, w: lax.scan(lambda c, w: (layer(c, w), w), x, w)[0], LAYERS, 1),
    "scan in scan": (
        lambda x, w: lax.scan(lambda c, w: (closure(c, w, steps=2), None), x, w)[0],
        LAYERS,
        1,
    ),
    "scan of no steps": (closure, SQUARE, 1),
    "lax.map": (lambda x, w: lax.map(lambda x: x @ w.T, x), SQUARE, 1),
    "fori_loop": (lambda x, w: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w.T), x), SQUARE, 1),
    "fori_loop, indexed": (lambda x, w: lax.fori_loop(0, 3, lambda i, c: layer(c, w[i]), x), LAYERS, 1),
    "while with a weight as carry": (
        lambda x, w: lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ s[2].T), s[2]), (0, x, w))[
            1
        ],
        SQUARE,
        1,
    ),
    "while whose condition multiplies": (
        lambda x, w: lax.while_loop(lambda c: jnp.abs(c @ w.T).sum() > 1.0, lambda c: c * 0.5, x),
        SQUARE,
        1,
    ),
    "cond": (lambda x, w: lax.cond(x.sum() > 0, lambda: jnp.tanh(x @ w.T), lambda: x), SQUARE, 1),
    "cond, both": (lambda x, w: lax.cond(x.sum() > 0, lambda: x @ w.T, lambda: x @ w), SQUARE, 2),
    "custom_jvp without weights": (lambda x, w: jax.nn.relu(x @ w.T), SQUARE, 1),
}


@pytest.mark.parametrize("name", CONTROL)
def test_control(name):
    f, w, fused = CONTROL[name]
    # At most six dots follow one another; a layer's norm is at most 2 (random square matrices), and there are 3.
    check(f, X, w, fused=fused, products=6 * 8, eager=name in ("jit", "scan over weights", "cond", "fori_loop"))


def test_scan_of_no_steps():
    check(lambda x, w: closure(x, w, steps=0), X, SQUARE, fused=1)


def test_weights_that_a_loop_changes_become_dense():
    def f(x, w):
        def body(s):
            return s[0] + 1, jnp.tanh(s[1] @ s[2].T), s[2] * 0.9

        return lax.while_loop(lambda s: s[0] < 3, body, (0, x, w))[1]

    check(f, X, SQUARE, fused=0, dense_weights=1, dots=1, products=48)


def test_weights_that_a_loop_transposes_become_dense():
    def f(x, w):
        return lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1].T), None), (x, w), None, length=3)[0][0]

    check(f, X, SQUARE, fused=0, dense_weights=1, dots=1, products=48)


def heads(x, w):
    """A projection whose result is split into heads; the weight's two free axes stand side by side."""
    return jnp.einsum("td,hkd->thk", x, w).reshape(x.shape)


# Bodies that multiply by an element of a stack in every way that keeps it where it lies; the stack.
IN_PLACE = {
    "plain": (layer, LAYERS),
    "transposed": (lambda x, w: layer(x, w.T), weight(3, 96, 96)),
    "nested jit": (jax.jit(layer), LAYERS),
    "checkpoint": (jax.checkpoint(layer), LAYERS),
    "cond": (lambda x, w: lax.cond(x.sum() > 0, layer, lambda x, w: x, x, w), LAYERS),
    "loop": (lambda x, w: lax.fori_loop(0, 2, lambda i, c: layer(c, w), x), LAYERS),
    "heads": (heads, weight(3, 4, 24, 96)),
    "reshape": (lambda x, w: layer(x, w.reshape(96, 96).T), weight(3, 4, 24, 96)),
    "experts": (lambda x, w: jnp.tanh(lax.ragged_dot(x, w, jnp.array([2, 0, 3]))), weight(3, 3, 96, 96, axis=-2)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_scan_copies_no_element(name):
    f, stack = IN_PLACE[name]

    def model(x, w):
        return lax.scan(lambda c, w: (f(c, w), None), x, w)[0]

    check(model, X, stack, fused=1, products=6 * 8)
    text = str(jax.make_jaxpr(jaxq.dispatch(model))(X, stack))
    # Each step counts, and takes nothing else of what is scanned or closed over.
    assert "dynamic_slice" not in text and " gather" not in text
    assert f"u32[{','.join(map(str, stack.packed.shape[1:]))}]" not in text


def test_element_that_is_rearranged_is_copied():
    """An einsum over two axes that are not neighbours in storage; the stack itself is not rearranged."""
    stack = weight(3, 24, 8, 96)

    def model(x, w):
        return lax.scan(lambda c, w: (c, jnp.einsum("thk,dhk->td", c, w)), x, w)[1]

    check(model, normal(5, 8, 96), stack, fused=1, products=8)


def test_scan_over_the_grouped_axis_is_dense():
    def f(x, w):
        return lax.scan(lambda c, row: (c + row, None), jnp.zeros(64), w.T)[0] + x[0, 0]

    check(f, X, W, fused=0, dense_weights=1)


def test_switch_between_weights():
    def f(i, x, a, b):
        return x @ lax.switch(i, [lambda: a, lambda: b]).T

    check(f, jnp.array(1), X, W, weight(64, 96, seed=5), fused=1)
    check(f, jnp.array(1), X, W, weight(64, 96, bits=8), fused=0, dense_weights=2, dots=1)


# ---- custom derivatives

SLOPE = 1.5  # What the rules below multiply the true derivative by, so that a test sees whether they were used.


@jax.custom_jvp
def with_jvp(x, w):
    return jnp.sin(x @ w.T)


@with_jvp.defjvp
def _(primals, tangents):
    (x, w), (dx, _) = primals, tangents
    return with_jvp(x, w), jnp.cos(x @ w.T) * (dx @ w.T) * SLOPE


@jax.custom_vjp
def with_vjp(x, w):
    return jnp.sin(x @ w.T)


def _forward(x, w):
    return with_vjp(x, w), (x, w)


def _backward(residuals, ct):
    x, w = residuals
    ct = ct * jnp.cos(x @ w.T) * SLOPE
    return ct @ w, ct.T @ x


with_vjp.defvjp(_forward, _backward)


@pytest.mark.parametrize("f", [with_jvp, with_vjp], ids=["custom_jvp", "custom_vjp"])
def test_custom_derivative(f):
    check(f, X, W, fused=1, eager=True)


@pytest.mark.parametrize("order", ["grad(dispatch)", "dispatch(grad)"])
@pytest.mark.parametrize("f", [with_jvp, with_vjp], ids=["custom_jvp", "custom_vjp"])
def test_custom_derivative_is_kept(f, order):
    """The user's rule gives the gradient, and runs fused; in custom_vjp the residual is the packed weight."""

    def total(x, w):
        return f(x, w).sum()

    gradient = {
        "grad(dispatch)": lambda f: jax.grad(jaxq.dispatch(f)),
        "dispatch(grad)": lambda f: jaxq.dispatch(jax.grad(f)),
    }[order]
    # Three dots: of the primal, of the rule's cosine, and the one with the tangent or cotangent, whose sum runs over
    # 64 and is at most sqrt(64) * |w| = 16 |x|.
    # The vjp rule makes the weight's cotangent as well, as it does without dispatch.
    dots = int(f is with_vjp)
    check(total, X, W, fused=3, dots=dots, transform=gradient, reference=jax.grad(total), products=16)


@pytest.mark.parametrize("f", [with_jvp, with_vjp], ids=["custom_jvp", "custom_vjp"])
def test_gradient_of_scales_through_custom_derivative(f):
    """The rules' derivatives with respect to the dense weight reach scales and biases by the chain rule."""

    def total(scales, biases, x):
        qw = jaxq.QuantizedArray(W.packed, scales, biases, spec=W.spec)
        return jaxq.dispatch(f)(x, qw).sum()

    got = jax.jit(jax.grad(total, argnums=(0, 1)))(W.scales, W.biases, X)
    dw = jax.grad(lambda w: f(X, w).sum())(dense(W)) if f is with_vjp else jnp.zeros(W.shape)
    groups = dw.reshape(64, 6, 16)
    codes = ((dense(W).reshape(64, 6, 16) - W.biases[..., None]) / W.scales[..., None]).round()
    expected = (groups * codes).sum(-1), groups.sum(-1)
    for g, e in zip(got, expected, strict=True):
        # Sums of 16 codes up to 15 times sums of 5 terms x * SLOPE, |x| < 5: at most 16 * 15 * 5 * 7.5 * eps * length.
        assert float(jnp.abs(g - e).max()) < 16 * 15 * 5 * 7.5 * 1.2e-7 * 16
    # The jvp rule above ignores the weight's tangent.
    assert (f is with_vjp) == bool(jnp.abs(got[0]).max() > 0)


def test_custom_vjp_with_static_and_integer_arguments():
    @jax.custom_vjp
    def look_up(ids, w):
        return w[ids]

    def forward(ids, w):
        return w[ids], (ids, w.shape)

    look_up.defvjp(forward, lambda residuals, ct: (None, jnp.zeros(residuals[1]).at[residuals[0]].add(ct)))

    def f(x, ids, w):
        return (x @ look_up(ids, w).T).sum()

    ids = jnp.array([1, 5, 7])
    check(f, X, ids, W, fused=0, dense_weights=1, dots=1, products=16)

    def gradient(f):
        return jax.grad(jaxq.dispatch(f))

    check(f, X, ids, W, fused=0, dense_weights=1, dots=None, transform=gradient, reference=jax.grad(f), products=16)
