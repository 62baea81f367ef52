"""Programs for several devices: what is split stays split, whatever the implementation."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import IMPLEMENTATIONS, activations, matmul_bound, weight
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq

SPEC = jaxq.QuantSpec(4, 32)
PARTITIONABLE = [name for name in IMPLEMENTATIONS if name in ("xla", "cpu")]


@pytest.fixture(scope="module", params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(request.param,) * 2)


def put(mesh, tree, *spec):
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


def collectives(f, *args):
    text = jax.jit(f).lower(*args).compile().as_text()
    return sorted(re.findall(r"= \S+ (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", text))


@pytest.mark.parametrize("implementation", PARTITIONABLE)
@pytest.mark.parametrize(
    ("x_spec", "w_spec", "transpose", "expected"),
    [
        ((None, None), ("model", None), True, []),
        (("data", None), ("model", None), True, []),
        (("data", None), (None, None), True, []),
        ((None, "model"), (None, "model"), True, ["all-reduce"]),
        (("data", "model"), (None, "model"), True, ["all-reduce"]),
        ((None, None), (None, "model"), False, []),
        ((None, "model"), ("model", None), False, ["all-reduce"]),
    ],
    ids=["column", "batch and column", "batch", "row", "batch and row", "plain column", "plain row"],
)
def test_matmul(mesh, x_spec, w_spec, transpose, expected, implementation):
    w = weight(SPEC, (32, 512))
    x = activations((8, 512 if transpose else 32))
    xs, qw = put(mesh, x, *x_spec), put(mesh, w.qw, *w_spec)

    def f(x, qw):
        return jaxq.quantized_matmul(x, qw, transpose=transpose, implementation=implementation)

    if expected and AxisType.Explicit in mesh.axis_types:
        with pytest.raises(ValueError, match=r"the contracted axis is partitioned .* use jax\.shard_map"):
            jax.jit(f)(xs, qw)
        return
    y = jax.jit(f)(xs, qw)
    error = np.abs(np.asarray(y, np.float64) - oracle.matmul(np.asarray(x), w.dense, transpose=transpose))
    assert (error <= matmul_bound(x, w.qw, w.dense, transpose=transpose)).all()
    assert collectives(f, xs, qw) == expected


@pytest.mark.parametrize("implementation", PARTITIONABLE)
def test_rank_three_and_batched_weights(mesh, implementation):
    w = weight(SPEC, (4, 32, 128))
    x = activations((4, 8, 128))
    with jaxq.use_implementation(implementation):
        y = jax.jit(jaxq.quantized_matmul)(put(mesh, x, "model", "data"), put(mesh, w.qw, "model"))
        error = np.abs(np.asarray(y, np.float64) - oracle.matmul(np.asarray(x), w.dense, transpose=True))
        assert (error <= matmul_bound(x, w.qw, w.dense, transpose=True)).all()
        assert collectives(jaxq.quantized_matmul, put(mesh, x, "model", "data"), put(mesh, w.qw, "model")) == []
        y = jax.jit(jaxq.quantized_matmul)(put(mesh, x, "data"), put(mesh, w.qw[0], "model"))
        np.testing.assert_allclose(y, x @ w.qw[0].T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", PARTITIONABLE)
def test_uneven_splits_are_right_too(implementation):
    """Groups that a split would cut, and rows that it doesn't divide: something is gathered, and the result holds."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    w = weight(jaxq.QuantSpec(4, 64), (32, 256))  # 4 groups over 8 devices
    x = activations((3, 256))
    with jaxq.use_implementation(implementation):
        y = jax.jit(jaxq.quantized_matmul)(put(mesh, x, None, "model"), put(mesh, w.qw, "model", None))
        np.testing.assert_allclose(y, oracle.matmul(np.asarray(x), w.dense, transpose=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", PARTITIONABLE)
def test_quantize_and_dequantize(mesh, implementation):
    w = np.random.default_rng(0).standard_normal((32, 512)).astype(np.float32)
    with jaxq.use_implementation(implementation):
        for spec in (("model", None), (None, "model"), ("data", "model")):
            dense = put(mesh, jnp.asarray(w), *spec)
            qw = jax.jit(lambda w: jaxq.quantize(w, group_size=32))(dense)
            jax.tree.map(np.testing.assert_array_equal, qw, jaxq.quantize(w, group_size=32))
            back = jax.jit(jaxq.dequantize)(qw)
            np.testing.assert_array_equal(back, jaxq.dequantize(jaxq.quantize(w, group_size=32)))
            if implementation == "cpu":
                assert collectives(lambda w: jaxq.quantize(w, group_size=32), dense) == []
                assert collectives(jaxq.dequantize, put(mesh, jaxq.quantize(w, group_size=32), *spec)) == []


@pytest.mark.parametrize("implementation", PARTITIONABLE)
def test_vmap_and_grad(implementation):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    w = weight(SPEC, (32, 128))
    x = activations((4, 8, 128))
    qw = put(mesh, w.qw, "model", None)
    with jaxq.use_implementation(implementation):
        y = jax.jit(jax.vmap(lambda x: x @ qw.T))(x)
        np.testing.assert_allclose(y, oracle.matmul(np.asarray(x), w.dense, transpose=True), rtol=1e-4, atol=1e-4)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(x @ qw.T))))(x)
        expected = 2 * (np.asarray(x, np.float64) @ w.dense.T) @ w.dense
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("x_spec", "w_spec"), [((), ("model", None)), ((None, "model"), (None, "model"))], ids=str)
def test_gradient_of_scales_in_parts(x_spec, w_spec, monkeypatch):
    """The parts of a large weight's cotangent take rows from every device, and the packed words stay where they are."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    w, x = weight(SPEC, (32, 512)), activations((8, 512))
    xs, qw = put(mesh, x, *x_spec), put(mesh, w.qw, *w_spec)

    def gradient(x, qw):
        return jax.grad(lambda qw: jnp.sum(jnp.sin(x @ qw.T)), allow_int=True)(qw)

    whole = jax.jit(gradient)(x, w.qw)
    monkeypatch.setattr(importlib.import_module("jaxq.primitives.quantized_matmul"), "_SLOPE_ENTRIES", 32 * 512 // 4)
    parts = jax.jit(lambda *args: gradient(*args))(xs, qw)
    for got, expected in ((parts.scales, whole.scales), (parts.biases, whole.biases)):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, P(*w_spec)), 2)
    # Where the contracted axis is split, partial products are summed; else nothing moves.
    assert set(collectives(lambda *args: gradient(*args), xs, qw)) == ({"all-reduce"} if x_spec else set())


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if ":" not in name])
def test_shard_map(implementation):
    """By hand: columns, then rows with a psum, under the check of which axes values vary over."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    up, down = weight(SPEC, (64, 128)), weight(SPEC, (128, 256), seed=4)
    narrow = jaxq.QuantizedArray(down.qw.packed[:, :], down.qw.scales, down.qw.biases, spec=SPEC)
    x = activations((8, 128))
    with jaxq.use_implementation(implementation):
        columns = jax.shard_map(
            lambda x, qw: x @ qw.T, mesh=mesh, in_specs=(P(), P("model", None)), out_specs=P(None, "model")
        )
        np.testing.assert_allclose(
            jax.jit(columns)(x, up.qw), oracle.matmul(np.asarray(x), up.dense, transpose=True), rtol=1e-4, atol=1e-4
        )
        rows = jax.shard_map(
            lambda x, qw: jax.lax.psum(x @ qw.T, "model"),
            mesh=mesh,
            in_specs=(P(None, "model"), P(None, "model")),
            out_specs=P(),
        )
        x = activations((8, 256))
        expected = oracle.matmul(np.asarray(x), down.dense, transpose=True)
        np.testing.assert_allclose(jax.jit(rows)(x, narrow), expected, rtol=1e-4, atol=1e-4)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(rows(x, narrow))))(x)
        np.testing.assert_allclose(gradient, np.ones((8, 128)) @ down.dense, rtol=1e-4, atol=1e-3)
