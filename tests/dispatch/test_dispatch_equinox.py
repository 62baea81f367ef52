"""Equinox modules that hold quantized weights in the place of dense ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dispatch_checks import GROUP, assert_close, bound, count, dense
from jax import lax

import jaxq
from jaxq import dispatch

eqx = pytest.importorskip("equinox")

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (5, 32))
TOLERANCE = bound(48, 2 * 2 * 48**0.5)


def quantized(module):
    """The module with the weights of its Linear and Embedding layers quantized, [out, in] as Equinox has them."""

    def layer(node):
        return isinstance(node, eqx.nn.Linear | eqx.nn.Embedding)

    def one(node):
        if not layer(node):
            return node
        return eqx.tree_at(lambda l: l.weight, node, jaxq.quantize(node.weight, group_size=GROUP))

    return jax.tree.map(one, module, is_leaf=layer)


def counts(f, *args):
    jaxpr, *_ = eqx.filter_make_jaxpr(f)(*args)
    return count(jaxpr, "quantized_matmul", "dequantize", "dot_general")


def test_linear():
    module = quantized(eqx.nn.Linear(32, 48, key=KEY))

    def f(m, x):
        return m(x)

    expected = f(dense(module), X[0])
    assert counts(dispatch(f), module, X[0]) == (1, 0, 0)
    for run in (eqx.filter_jit(dispatch(f)), dispatch(f), dispatch(eqx.filter_jit(f))):
        assert_close(run(module, X[0]), expected, TOLERANCE)
    assert counts(dispatch(module), X[0]) == (1, 0, 0)
    assert_close(dispatch(module)(X[0]), expected, TOLERANCE)


def test_mlp_under_vmap():
    module = quantized(eqx.nn.MLP(32, 16, 48, 2, activation=jax.nn.gelu, key=KEY))

    def f(m, x):
        return jax.vmap(m)(x)

    expected = f(dense(module), X)
    runs = {
        "vmap inside": dispatch(f, fallback="error"),
        "filter_vmap inside": dispatch(eqx.filter_vmap(lambda m, x: m(x), in_axes=(None, 0))),
        "filter_vmap outside": eqx.filter_vmap(dispatch(lambda m, x: m(x)), in_axes=(None, 0)),
    }
    for run in runs.values():
        assert counts(run, module, X) == (3, 0, 0)
        assert_close(eqx.filter_jit(run)(module, X), expected, 3 * 4 * TOLERANCE)


def test_attention_and_embedding():
    attention = quantized(eqx.nn.MultiheadAttention(2, 32, key=KEY))
    embedding = quantized(eqx.nn.Embedding(64, 32, key=KEY))

    def f(attention, embedding, ids):
        h = jax.vmap(embedding)(ids)
        return attention(h, h, h, inference=True)

    ids = jnp.arange(7)
    run = dispatch(f, fallback="error")
    # The attention's own two dots are of activations.
    assert counts(run, attention, embedding, ids) == (4, 1, 2)
    expected = f(dense(attention), dense(embedding), ids)
    assert_close(eqx.filter_jit(run)(attention, embedding, ids), expected, 4 * 4 * TOLERANCE)


class Lora(eqx.Module):
    base: eqx.nn.Linear
    a: jax.Array
    b: jax.Array

    def __call__(self, x):
        return self.base(x) + self.b @ (self.a @ x)


def test_gradient_of_a_partition():
    """Weights in the frozen half; in the other half they are absent."""

    def normal(*shape):
        return jax.random.normal(jax.random.key(1), shape) / 4

    module = Lora(quantized(eqx.nn.Linear(32, 48, key=KEY)), normal(4, 32), normal(48, 4))

    def halves(module):
        trained = jax.tree.map(lambda _: False, module)
        return eqx.partition(module, eqx.tree_at(lambda m: (m.a, m.b), trained, (True, True)))

    def loss(trained, frozen, x):
        return (eqx.combine(trained, frozen)(x) ** 2).sum()

    got = eqx.filter_jit(eqx.filter_grad(dispatch(loss, fallback="error")))(*halves(module), X[0])
    expected = eqx.filter_grad(loss)(*halves(dense(module)), X[0])
    # 2 y times a product: |y| < 20 and |x| < 10 here.
    for g, e in ((got.a, expected.a), (got.b, expected.b)):
        assert_close(g, e, 200 * TOLERANCE)


def test_gradient_of_everything():
    """Scales and biases are float leaves, and get their gradients; the words get none."""
    module = quantized(eqx.nn.Linear(32, 48, key=KEY))
    gradient = eqx.filter_grad(dispatch(lambda m, x: (m(x) ** 2).sum()))(module, X[0])

    assert gradient.weight.packed is None
    y = dense(module)(X[0])
    expected = (2 * y)[:, None] * X[0].reshape(2, GROUP).sum(-1)
    # |y| < 20, a sum of 16 values.
    np.testing.assert_allclose(gradient.weight.biases, expected, atol=2 * 16 * TOLERANCE)
    assert gradient.weight.scales.shape == (48, 2) and float(jnp.abs(gradient.weight.scales).max()) > 0


def test_scan_over_stacked_layers():
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(32, 32, key=key))
    modules = quantized(make(jax.random.split(KEY, 3)))

    def f(modules, x):
        arrays, rest = eqx.partition(modules, eqx.is_array)
        return lax.scan(lambda c, layer: (jnp.tanh(eqx.combine(layer, rest)(c)), None), x, arrays)[0]

    run = dispatch(f, fallback="error")
    assert counts(run, modules, X[0]) == (1, 0, 0)
    assert_close(eqx.filter_jit(run)(modules, X[0]), f(dense(modules), X[0]), 3 * 4 * TOLERANCE)


def test_filter_checkpoint():
    module = quantized(eqx.nn.Linear(32, 32, key=KEY))

    def f(m, x):
        return eqx.filter_checkpoint(lambda m, x: jnp.tanh(m(x)))(m, x)

    run = dispatch(f)
    assert counts(run, module, X[0]) == (1, 0, 0)
    assert_close(eqx.filter_jit(run)(module, X[0]), f(dense(module), X[0]), TOLERANCE)


def test_bound_method():
    module = quantized(eqx.nn.MLP(32, 16, 48, 1, key=KEY))
    run = dispatch(module.__call__, fallback="error")
    assert counts(run, X[0]) == (2, 0, 0)
    assert_close(run(X[0]), dense(module)(X[0]), 2 * 4 * TOLERANCE)
