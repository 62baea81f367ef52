"""dispatch composes with JAX's transformations in either order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dispatch_checks import assert_close, bound, check, count, dense, normal, weight
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import dispatch

X = normal(5, 96)
W = weight(64, 96)
LAYERS = weight(3, 96, 96, axis=-2)

# ---- vmap


def test_vmap_inside_over_x():
    check(lambda x, w: jax.vmap(lambda r: w @ r)(x), X, W, fused=1)


def test_vmap_inside_over_weights():
    check(lambda x, w: jax.vmap(lambda w: x @ w)(w), X, LAYERS, fused=1)


def test_vmap_inside_over_another_axis():
    check(lambda x, w: jax.vmap(lambda w: x @ w, in_axes=1, out_axes=1)(w), X, weight(96, 3, 64, axis=0), fused=1)


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
def test_vmap_outside(in_axes):
    def f(x, w):
        return x @ w

    x = normal(3, 5, 96) if in_axes[0] == 0 else X
    w = LAYERS if in_axes[1] == 0 else weight(96, 96, axis=-2)

    def mapped(f):
        return jax.vmap(f, in_axes=in_axes)

    check(f, x, w, fused=1, transform=lambda f: mapped(dispatch(f)), reference=mapped(f))
    check(f, x, w, fused=1, transform=lambda f: dispatch(mapped(f)), reference=mapped(f))


# ---- derivatives

LORA = normal(96, 4) / 10, normal(4, 64) / 2


def loss(lora, x, w):
    return jnp.mean(jax.nn.silu(x @ w.T + x @ lora[0] @ lora[1]) ** 2)


def layers_loss(lora, x, w):
    def step(c, layer):
        w, (a, b) = layer
        return jnp.tanh(c @ w + c @ a @ b) + c, None

    return jnp.mean(lax.scan(jax.checkpoint(step), x, (w, lora))[0] ** 2)


LAYERS_LORA = normal(3, 96, 4) / 10, normal(3, 4, 96) / 10
ORDERS = {"grad(dispatch)": lambda g: lambda f: g(dispatch(f)), "dispatch(grad)": lambda g: lambda f: dispatch(g(f))}


@pytest.mark.parametrize("order", ORDERS)
def test_lora_gradient(order):
    """Two products: forward, and none backward, since x is not differentiated."""
    transform = ORDERS[order](jax.value_and_grad)
    check(loss, LORA, X, W, fused=1, dots=None, transform=transform, reference=jax.value_and_grad(loss), products=16)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("policy", [None, "dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable"])
def test_scan_and_checkpoint_gradient(order, policy):
    """Forward, backward, and once more where the policy does not save the dots."""
    policy = policy and getattr(jax.checkpoint_policies, policy)

    def layers_loss(lora, x, w):
        def step(c, layer):
            w, (a, b) = layer
            return jnp.tanh(c @ w + c @ a @ b) + c, None

        return jnp.mean(lax.scan(jax.checkpoint(step, policy=policy), x, (w, lora))[0] ** 2)

    transform = ORDERS[order](jax.grad)
    # Three layers that stretch by at most 1 + 2 + 1 each, forward and backward.
    fused = 3 if policy is None else 2
    args = (LAYERS_LORA, X, LAYERS)
    check(
        layers_loss, *args, fused=fused, dots=None, transform=transform, reference=jax.grad(layers_loss), products=200
    )


def test_gradient_of_x():
    def f(x, w):
        return jnp.sum(jnp.sin(x @ w.T))

    for transform in (lambda f: jax.grad(dispatch(f)), lambda f: dispatch(jax.grad(f))):
        check(f, X, W, fused=2, transform=transform, reference=jax.grad(f), products=16)


def test_gradient_of_the_dense_weight_inside():
    """dispatch(grad) with respect to a weight: it is a float array there, and so is its gradient."""

    def f(w, x):
        return jnp.sum(jnp.sin(x @ w.T))

    check(f, W, X, fused=1, dots=1, transform=lambda f: dispatch(jax.grad(f)), reference=jax.grad(f), products=16)


def test_gradient_of_scales_and_biases():
    """grad(dispatch) with respect to a weight: its leaves' gradients, by the chain rule."""

    def f(w, x):
        return jnp.sum(jnp.sin(x @ w.T))

    got = jax.jit(jax.grad(dispatch(f), allow_int=True))(W, X)
    assert got.packed.dtype == jax.dtypes.float0
    dw = jax.grad(f)(dense(W), X).reshape(64, 6, 16)
    codes = ((dense(W).reshape(64, 6, 16) - W.biases[..., None]) / W.scales[..., None]).round()
    # Sums of 16 codes up to 15 times sums of 5 terms |x| < 5.
    for g, e in ((got.scales, (dw * codes).sum(-1)), (got.biases, dw.sum(-1))):
        np.testing.assert_allclose(g, e, atol=16 * 15 * 5 * 5 * 1.2e-7 * 16)


@pytest.mark.parametrize("order", ["grad of dispatch", "dispatch of grad"])
def test_gradient_through_a_weight_made_inside(order):
    """A weight that the function makes of arrays, scales and biases computed from what is trained."""
    (packed, scales, _), format_of_w = W.leaves, W.spec

    def f(trained, x):
        w = jaxq.QuantizedArray(packed, scales * jnp.exp(trained["log"]), trained["biases"], spec=format_of_w)
        return jnp.sum(jnp.sin(x @ w.T))

    trained = {"log": jnp.zeros((64, 1)), "biases": W.biases}
    g = jax.grad(dispatch(f)) if order == "grad of dispatch" else dispatch(jax.grad(f))
    assert count(jax.make_jaxpr(g)(trained, X), "dequantize") == (0,)
    got = jax.jit(g)(trained, X)
    leaves = jax.grad(dispatch(lambda w, x: jnp.sum(jnp.sin(x @ w.T))), allow_int=True)(W, X)
    np.testing.assert_allclose(got["biases"], leaves.biases, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got["log"], (leaves.scales * scales).sum(-1, keepdims=True), rtol=1e-5, atol=1e-5)


def test_jvp():
    def jvp(f):
        return lambda x, w: jax.jvp(lambda x: f(x, w), (x,), (x,))

    def f(x, w):
        return x @ w.T

    check(f, X, W, fused=2, transform=lambda f: jvp(dispatch(f)), reference=jvp(f))
    check(f, X, W, fused=2, transform=lambda f: dispatch(jvp(f)), reference=jvp(f))


def test_hessian():
    def f(x, w):
        return jnp.sum(jnp.sin(w @ x))

    w = weight(64, 96)

    # w @ x and its cotangent, and the tangents of both.
    # Sums of 64 products of two weights; |w| in a column is at most 2.
    def hessian(f):
        return jax.hessian(dispatch(f))

    args = X[0], w
    check(f, *args, fused=4, dots=None, transform=hessian, reference=jax.hessian(f), products=16)


def test_linearize_and_transpose():
    y, f_jvp = jax.linearize(lambda x: dispatch(lambda x, w: x @ w.T)(x, W), X)
    np.testing.assert_array_equal(y, f_jvp(X))
    (ct,) = jax.linear_transpose(lambda x: dispatch(lambda x, w: x @ w.T)(x, W), X)(y)
    assert_close(ct, y @ dense(W), bound(64, 2 * float(jnp.linalg.norm(y, axis=-1).max()) * 2))


def test_checkpoint_outside():
    def f(x, w):
        return jnp.sum(jnp.sin(x @ w.T))

    def transform(f):
        return jax.grad(jax.checkpoint(dispatch(f)))

    check(f, X, W, fused=3, transform=transform, reference=jax.grad(f), products=16)


# ---- jit, nesting, other arguments


def test_jit_inside_and_outside():
    def f(x, w):
        return x @ w.T

    check(f, X, W, fused=1, transform=lambda f: dispatch(jax.jit(f)), eager=True)
    check(f, X, W, fused=1, transform=lambda f: jax.jit(dispatch(f)), eager=True)


def test_nested_dispatch():
    check(lambda x, w: dispatch(lambda x, w: x @ w.T)(x, w), X, W, fused=1)
    check(lambda x: dispatch(lambda x, w: x @ w.T)(x, W), X, fused=1, reference=lambda x: x @ dense(W).T)


def test_scan_outside():
    def f(x, w):
        return lax.scan(lambda c, w: (jax.nn.relu(c @ w), None), x, w)[0]

    def run(x, w):
        return lax.scan(lambda c, w: (dispatch(lambda c, w: jax.nn.relu(c @ w))(c, w), None), x, w)[0]

    check(f, X, LAYERS, fused=1, transform=lambda _: run, products=24)


def test_eval_shape_and_export():
    out = jax.eval_shape(dispatch(lambda x, w: (x @ w.T, w.T)), X, W)
    assert out[0].shape == (5, 64) and jaxq.is_quantized(out[1])
    assert out[1].shape == (96, 64) and out[1].packed.shape == W.packed.shape


def test_random_keys_and_effects():
    def f(key, x, w):
        return x @ w.T + jax.random.normal(key, (5, 64))

    check(f, jax.random.key(3), X, W, fused=1)

    def f(x, w):
        return (jax.debug.print("{}", x.sum()), x @ w.T)[1]

    check(f, X, W, fused=1)


def test_arguments_that_are_no_arrays():
    def f(x, *, w, act, train, scale=2):
        return {"y": act(x @ w.T) * scale if train else x, "name": "kept", "none": None, "np": np.arange(3)}

    out = dispatch(f)(X, w=W, act=jax.nn.relu, train=True)
    assert out["name"] == "kept" and out["none"] is None and isinstance(out["np"], np.ndarray)
    assert_close(out["y"], jax.nn.relu(X @ dense(W).T) * 2, bound(96, 4 * 96**0.5))


def test_numpy_leaves():
    w = jax.tree.map(np.asarray, W)
    np.testing.assert_array_equal(dispatch(lambda x, w: x @ w.T)(X, w), dispatch(lambda x, w: x @ w.T)(X, W))


def test_use_implementation():
    run = jax.jit(dispatch(lambda x, w: x @ w.T))
    run(X, W)
    with jaxq.use_implementation("xla"):
        jaxpr = jax.make_jaxpr(dispatch(jax.jit(lambda x, w: x @ w.T)))(X, W)
    assert "implementation=xla" in str(jaxpr)
    assert "implementation=None" in str(jax.make_jaxpr(run)(X, W))


def test_the_program_is_that_of_explicit_products():
    """Nothing is left of dispatch when the program runs."""

    def model(x, w):
        return jax.nn.silu(x @ w.T)

    explicit = jax.jit(lambda x, w: jax.nn.silu(jaxq.quantized_matmul(x, w))).lower(X, W).as_text()
    dispatched = jax.jit(dispatch(model)).lower(X, W).as_text()
    assert dispatched.replace("jit_model", "") == explicit.replace("jit__lambda", "")


def test_disable_jit():
    def f(x, w):
        return lax.scan(lambda c, w: (jax.nn.relu(c @ w), None), x, w)[0]

    with jax.disable_jit():
        assert_close(dispatch(f)(X, LAYERS), f(X, dense(LAYERS)), bound(96, 4 * 96**0.5, products=24))


def test_float64_is_dense():
    with jax.enable_x64(True):
        x = jnp.asarray(np.asarray(X, np.float64))

        def f(x, w):
            return x @ w.astype(jnp.float64).T

        assert count(jax.make_jaxpr(dispatch(f))(x, W), "quantized_matmul", "dequantize") == (0, 1)
        y = jax.jit(dispatch(f))(x, W)
        # The weight is rounded to float32 on its way, the product is in float64.
        np.testing.assert_allclose(y, np.asarray(X, np.float64) @ np.asarray(dense(W), np.float64).T, atol=1e-5)


# ---- parts of trees


def test_partitioned_weights():
    """Halves of a partition: absent weights are None inside, and others that are incomplete stay pytrees."""
    none = jaxq.QuantizedArray(None, None, None, spec=W.spec)
    assert dispatch(lambda w: w is None)(none)
    mask = jaxq.QuantizedArray(False, True, True, spec=W.spec)
    assert dispatch(lambda m: jax.tree.leaves(m) == [False, True, True])(mask)
    floats = jaxq.QuantizedArray(None, W.scales, W.biases, spec=W.spec)
    words = jaxq.QuantizedArray(W.packed, None, None, spec=W.spec)

    def f(floats, words, x):
        w = jax.tree.map(lambda a, b: b if a is None else a, floats, words, is_leaf=lambda x: x is None)
        return x @ w.T

    run = dispatch(f)
    assert count(jax.make_jaxpr(run)(floats, words, X), "quantized_matmul", "dot_general") == (1, 0)
    assert_close(run(floats, words, X), X @ dense(W).T, bound(96, 2 * 96**0.5))


# ---- meshes


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((2,), ("i",), axis_types=(kind,), devices=jax.devices()[:2])


SPECS = {"rows of x": (P("i"), P()), "result": (P(), P("i")), "both whole": (P(), P())}


@pytest.mark.parametrize("order", ["shard_map(dispatch)", "dispatch(shard_map)"])
@pytest.mark.parametrize("which", SPECS)
def test_shard_map(order, which):
    x_spec, w_spec = SPECS[which]

    def f(x, w):
        return x @ w.T

    def mapped(f):
        return jax.shard_map(f, mesh=mesh(), in_specs=(x_spec, w_spec), out_specs=P(*x_spec, *w_spec))

    transform = (lambda f: mapped(dispatch(f))) if order == "shard_map(dispatch)" else lambda f: dispatch(mapped(f))
    if which == "result":

        def mapped(f):
            return jax.shard_map(f, mesh=mesh(), in_specs=(x_spec, w_spec), out_specs=P(None, "i"))

    check(f, normal(4, 96), W, fused=1, transform=transform, reference=f)


@pytest.mark.parametrize("groups", [3, 1])
def test_shard_map_over_the_contracted_axis(groups):
    """Whole groups on each device are multiplied fused; cut groups are not."""

    def f(x, w):
        return lax.psum(x @ w.T, "i")

    mapped = jax.shard_map(f, mesh=mesh(), in_specs=(P(None, "i"), P(None, "i")), out_specs=P())
    w = weight(64, 32 * groups)
    if groups == 1:
        w = jaxq.quantize(dense(w), group_size=32)
    fused = int(groups == 3)
    args = normal(4, 32 * groups), w

    def transform(_):
        return dispatch(mapped)

    def reference(x, w):
        return x @ w.T

    check(f, *args, fused=fused, dense_weights=1 - fused, dots=1 - fused, transform=transform, reference=reference)


def test_reshard():
    """On an explicit mesh."""
    with jax.set_mesh(mesh(AxisType.Explicit)):

        def f(x, w):
            return x @ jax.sharding.reshard(w, P("i", None)).T

        x, w = (jax.sharding.reshard(a, P()) for a in (X, W))
        jaxpr = jax.make_jaxpr(dispatch(f))(x, w)
        assert count(jaxpr, "quantized_matmul", "dequantize", "reshard") == (1, 0, 3)
        y = jax.jit(dispatch(f))(x, w)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh(AxisType.Explicit), P(None, "i")), 2)
    assert_close(jax.device_get(y), jax.device_get(X @ dense(W).T), bound(96, 2 * 96**0.5))


def test_sharding_constraint():
    """The constraint reaches the packed data."""

    def f(x, w):
        w = lax.with_sharding_constraint(w, NamedSharding(mesh(), P(None, "i")))
        return x @ w.T

    check(f, X, W, fused=1)
    jaxpr = jax.make_jaxpr(dispatch(f))(X, W)
    assert count(jaxpr, "sharding_constraint") == (3,)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_weights(kind):
    """Weights that are partitioned over devices by their rows, under jit."""
    with jax.set_mesh(mesh(kind)):
        w = jax.device_put(W, NamedSharding(mesh(kind), P("i", None)))
        x = jax.device_put(X, NamedSharding(mesh(kind), P()))

        def f(x, w):
            return jax.nn.relu(x @ w.T)

        y = jax.jit(dispatch(f))(x, w)
        jaxpr = jax.make_jaxpr(dispatch(f))(x, w)
        assert count(jaxpr, "quantized_matmul", "dequantize") == (1, 0)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh(kind), P(None, "i")), 2)
    assert_close(jax.device_get(y), jax.device_get(jax.nn.relu(X @ dense(W).T)), bound(96, 2 * 96**0.5))
