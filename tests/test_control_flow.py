"""scan, while, cond, checkpoint, nested jit, closures, donation, export; and nothing is compiled twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FEW_SPECS, IMPLEMENTATIONS, activations, refused, weight
from jax import lax

import jaxq

SPEC = jaxq.QuantSpec(4, 32)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with jaxq.use_implementation(request.param):
        yield request.param


@pytest.mark.parametrize("spec", FEW_SPECS, ids=str)
def test_scan_over_stacked_layers(implementation, spec):
    if refused(implementation, "quantized_matmul", spec):
        return
    layers = weight(spec, (4, 64, 64)).qw
    x = activations((3, 64))

    def apply(x, layers):
        return lax.scan(lambda x, qw: (jnp.tanh(x @ qw.T), qw.shape[0]), x, layers)[0]

    expected = x
    for layer in layers:
        expected = jnp.tanh(expected @ layer.T)
    np.testing.assert_allclose(jax.jit(apply)(x, layers), expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(apply(x, layers)))(x)
    assert np.isfinite(gradient).all()


def test_scan_carries_and_stacks_weights(implementation):
    qw = weight(SPEC, (64, 64)).qw
    (last, y), stacked = lax.scan(
        lambda c, _: ((c[0], jnp.tanh(c[1] @ c[0].T)), c[0]), (qw, jnp.ones((2, 64))), None, 3
    )
    assert last.shape == (64, 64) and stacked.shape == (3, 64, 64) and y.shape == (2, 64)
    np.testing.assert_array_equal(stacked.packed[2], qw.packed)


def test_while(implementation):
    qw = weight(SPEC, (64, 64)).qw
    x = activations((2, 64))
    y = lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ qw.T), x)
    expected = jnp.tanh(jnp.tanh(jnp.tanh(x @ qw.T) @ qw.T) @ qw.T)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_cond(implementation):
    one, two = weight(SPEC, (8, 64)).qw, weight(SPEC, (8, 64), seed=3).qw
    x = activations((2, 64))

    @jax.jit
    def f(i, x, one, two):
        return x @ lax.cond(i > 0, lambda: one, lambda: two).T

    np.testing.assert_allclose(f(1, x, one, two), x @ one.T, rtol=1e-6)
    np.testing.assert_allclose(f(0, x, one, two), x @ two.T, rtol=1e-6)


def test_checkpoint(implementation):
    qw = weight(SPEC, (64, 64)).qw
    x = activations((2, 64))

    def loss(x, qw):
        return jnp.sum(jnp.sin(jnp.tanh(x @ qw.T) @ qw.T))

    np.testing.assert_allclose(jax.grad(jax.checkpoint(loss))(x, qw), jax.grad(loss)(x, qw), rtol=1e-5, atol=1e-5)


def test_nested_jit_and_closure(implementation):
    qw = weight(SPEC, (8, 64)).qw
    x = activations((2, 64))
    inner = jax.jit(lambda x: x @ qw.T)
    np.testing.assert_array_equal(jax.jit(lambda x: inner(x) + 0)(x), x @ qw.T)


def test_donation():
    qw = weight(SPEC, (8, 64)).qw
    out = jax.jit(lambda qw: jax.tree.map(lambda leaf: leaf + leaf.dtype.type(1), qw), donate_argnums=0)(qw)
    assert out.shape == (8, 64) and all(leaf.is_deleted() for leaf in jax.tree.leaves(qw))


def test_implementation_is_part_of_the_jit_key():
    qw = weight(SPEC, (8, 64)).qw
    traces = []

    @jax.jit
    def f(x):
        traces.append(None)
        return x @ qw.T

    x = activations((2, 64))
    for name in (None, "xla", None, "xla"):
        with jaxq.use_implementation(name):
            f(x)
    assert len(traces) == 2
    with jaxq.use_implementation("xla"):
        text = str(jax.make_jaxpr(lambda x: x @ qw.T)(x))
        override = str(jax.make_jaxpr(lambda x: jaxq.quantized_matmul(x, qw, implementation="xla"))(x))
    assert "implementation=xla" in text and "implementation=xla" in override
    assert "implementation=None" in str(jax.make_jaxpr(lambda x: x @ qw.T)(x))


def test_eager_calls_compile_once(caplog):
    w, x = activations((8, 64), seed=11), activations((3, 64), seed=12)

    def use():
        qw = jaxq.quantize(w, bits=6, group_size=16)
        return jaxq.dequantize(qw, jnp.float16), x @ qw.T, jax.vmap(lambda x: x @ qw.T)(x)

    use()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        use()
    assert not [r for r in caplog.records if "compil" in r.getMessage().lower()]


@pytest.mark.parametrize("spec", FEW_SPECS, ids=str)
def test_export_round_trip(spec):
    from jax import export

    w = weight(spec, (8, 128))

    def f(x, packed, scales, biases):
        return x @ jaxq.QuantizedArray(packed, scales, biases, spec=spec).T

    x = activations((3, 128))
    with jaxq.use_implementation("xla"):
        exported = export.export(jax.jit(f), platforms=["cpu", "cuda", "tpu"])(x, *w.qw.tree_flatten()[0])
    restored = export.deserialize(exported.serialize())
    np.testing.assert_allclose(
        restored.call(x, *w.qw.tree_flatten()[0]), jaxq.quantized_matmul(x, w.qw), rtol=1e-5, atol=1e-5
    )


def test_a_name_that_does_not_serve_the_platform_is_refused_when_lowered():
    qw = weight(SPEC, (8, 64)).qw
    traced = jax.jit(lambda x: jaxq.quantized_matmul(x, qw, implementation="mps")).trace(activations((2, 64)))
    with pytest.raises(ValueError, match="implementation='mps' serves mps, and this is lowered for cpu"):
        traced.lower()
