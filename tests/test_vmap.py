"""vmap over x, over weights, over both."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import FEW_SPECS, IMPLEMENTATIONS, activations, matmul_bound, refused, weight
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxq


def close(y, x, w, transpose=True):
    expected = oracle.matmul(np.asarray(x), w.dense, transpose=transpose)
    error = np.abs(np.asarray(y, np.float64) - expected)
    assert y.shape == expected.shape
    assert (error <= matmul_bound(x, w.qw, w.dense, transpose=transpose)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("transpose", [True, False], ids=["transpose", "plain"])
@pytest.mark.parametrize("spec", FEW_SPECS, ids=str)
def test_vmap(spec, transpose, implementation):
    if refused(implementation, "quantized_matmul", spec):
        return
    w = weight(spec, (3, 24, 128))
    x = activations((3, 5, 128 if transpose else 24))

    def product(x, qw):
        return jaxq.quantized_matmul(x, qw, transpose=transpose, implementation=implementation)

    close(jax.vmap(product)(x, w.qw), x, w, transpose)
    close(jax.jit(jax.vmap(product))(x, w.qw), x, w, transpose)
    close(jax.vmap(product, in_axes=(None, 0))(x[0], w.qw), jnp.stack([x[0]] * 3), w, transpose)
    one = weight(spec, (24, 128))
    for axis in (0, 1, 2, -1):
        y = jax.vmap(lambda x: product(x, one.qw), in_axes=axis, out_axes=1)(jnp.moveaxis(x, 0, axis))
        close(jnp.moveaxis(y, 1, 0), x, one, transpose)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nested(implementation):
    w = weight(jaxq.QuantSpec(4, 64), (2, 3, 24, 128))
    x = activations((2, 3, 128))
    with jaxq.use_implementation(implementation):
        y = jax.vmap(jax.vmap(jaxq.quantized_matmul))(x, w.qw)
    close(y[..., None, :], x[..., None, :], w)


def test_a_batch_of_x_reads_the_weight_once():
    """vmap over x alone makes more rows of one product; it neither copies nor repeats the weight."""
    w = weight(jaxq.QuantSpec(4, 64), (24, 128))
    jaxpr = jax.make_jaxpr(jax.vmap(lambda x: x @ w.qw.T))(activations((7, 128)))
    (equation,) = [e for e in jaxpr.eqns if e.primitive.name == "quantized_matmul"]
    assert [v.aval.shape for v in equation.invars[:2]] == [(7, 128), (24, 16)]


@given(batch=st.integers(1, 3), rows=st.integers(0, 3), axis=st.integers(0, 1), over_w=st.booleans())
@settings(deadline=None, max_examples=12)
def test_vmap_is_a_loop(batch, rows, axis, over_w):
    spec = jaxq.QuantSpec(4, 32)
    w = weight(spec, (batch, 8, 64)) if over_w else weight(spec, (8, 64))
    x = activations((batch, rows, 64))
    mapped = jax.jit(jax.vmap(jaxq.quantized_matmul, in_axes=(axis, 0 if over_w else None)))(
        jnp.moveaxis(x, 0, axis), w.qw
    )
    for i in range(batch):
        one = jaxq.quantized_matmul(x[i], w.qw[i] if over_w else w.qw)
        np.testing.assert_allclose(mapped[i], one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", FEW_SPECS, ids=str)
def test_dequantize(spec):
    w = weight(spec, (3, 24, 128))
    np.testing.assert_array_equal(jax.vmap(jaxq.dequantize)(w.qw), jaxq.dequantize(w.qw))
    partly = w.qw.tree_unflatten((w.qw.spec, w.qw.axis), (w.qw.packed[0], w.qw.scales, w.qw.biases))
    axes = partly.tree_unflatten((w.qw.spec, w.qw.axis), (None, 0, 0 if w.qw.biases is not None else None))
    out = jax.vmap(jaxq.dequantize, in_axes=(axes,))(partly)
    assert out.shape == (3, 24, 128)
    np.testing.assert_array_equal(out[0], jaxq.dequantize(w.qw[0]))
