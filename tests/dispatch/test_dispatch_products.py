"""Dots with a quantized operand run as one quantized product, whatever their axes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dispatch_checks import bound, check, count, dense, normal, weight
from jax import lax

import jaxq
from jaxq.primitives import common

X = normal(5, 96)
TOKENS = normal(2, 3, 96)
HEADS = weight(96, 4, 16, axis=0)
W = weight(64, 96)
KERNEL = weight(96, 64, axis=-2)
EXPERTS = weight(3, 64, 32, axis=-2)

PRODUCTS = {
    "x @ w.T": (lambda x, w: x @ w.T, X, W),
    "x @ w, the axis that is not grouped": (lambda x, w: x @ w, normal(5, 64), W),
    "x @ kernel": (lambda x, w: x @ w, X, KERNEL),
    "jnp.dot": (lambda x, w: jnp.dot(x, w), X, KERNEL),
    "jnp.dot of a vector": (lambda x, w: jnp.dot(x, w), X[0], KERNEL),
    "w @ vector": (lambda x, w: w @ x, X[0], W),
    "jnp.matmul, w first": (lambda x, w: jnp.matmul(w, x.T), X, W),
    "jnp.matmul over a batch": (lambda x, w: jnp.matmul(x, w), normal(2, 5, 96), KERNEL),
    "jnp.vdot": (lambda x, w: jnp.vdot(x, w), normal(64, 96), W),
    "jnp.inner": (lambda x, w: jnp.inner(x, w), X, W),
    "jnp.tensordot": (lambda x, w: jnp.tensordot(x, w, axes=[[1], [1]]), X, W),
    "jnp.tensordot over both axes": (lambda x, w: jnp.tensordot(x, w, axes=2), normal(5, 64, 96), W),
    "einsum bi,oi->bo": (lambda x, w: jnp.einsum("bi,oi->bo", x, w), X, W),
    "einsum bi,oi->ob": (lambda x, w: jnp.einsum("bi,oi->ob", x, w), X, W),
    "einsum btd,dhk->bthk": (
        lambda x, w: jnp.einsum("btd,dhk->bthk", x, w),
        normal(2, 3, 96),
        weight(96, 4, 16, axis=0),
    ),
    "einsum btd,dhk->bhtk": (
        lambda x, w: jnp.einsum("btd,dhk->bhtk", x, w),
        normal(2, 3, 96),
        weight(96, 4, 16, axis=0),
    ),
    "einsum bthk,hkd->btd, both contracted and grouped": (
        lambda x, w: jnp.einsum("bthk,hkd->btd", x, w),
        normal(2, 3, 4, 32),
        weight(4, 32, 48, axis=(0, 1)),
    ),
    "einsum bthk,hkd->btd, one grouped": (
        lambda x, w: jnp.einsum("bthk,hkd->btd", x, w),
        normal(2, 3, 4, 32),
        weight(4, 32, 48, axis=1),
    ),
    "einsum bthk,hkd->btd, the free axis grouped": (
        lambda x, w: jnp.einsum("bthk,hkd->btd", x, w),
        normal(2, 3, 4, 32),
        weight(4, 32, 48),
    ),
    "einsum btd,hkd->bthk, the first two free": (
        lambda x, w: jnp.einsum("btd,hkd->bthk", x, w),
        normal(2, 3, 48),
        weight(4, 32, 48, axis=(0, 1)),
    ),
    "experts ebd,edf->ebf": (lambda x, w: jnp.einsum("ebd,edf->ebf", x, w), normal(3, 5, 64), EXPERTS),
    "experts bd,edf->bef": (lambda x, w: jnp.einsum("bd,edf->bef", x, w), normal(5, 64), EXPERTS),
    "experts bed,edf->bef": (lambda x, w: jnp.einsum("bed,edf->bef", x, w), normal(5, 3, 64), EXPERTS),
    "experts edf,ebd->bfe": (lambda x, w: jnp.einsum("edf,ebd->bfe", w, x), normal(3, 5, 64), EXPERTS),
    "lax.dot_general": (lambda x, w: lax.dot_general(x, w, (((1,), (1,)), ((), ()))), X, W),
    "lax.dot": (lambda x, w: lax.dot(x, w), X, KERNEL),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_product(name):
    f, x, w = PRODUCTS[name]
    # The sums of the two-axis products run over both.
    check(f, x, w, fused=1, tolerance=bound(x.size, 2 * float(jnp.linalg.norm(x)) * 8) if "vdot" in name else None)


def test_three_operands():
    check(lambda x, w, y: jnp.einsum("bi,oi,bo->b", x, w, y), X, W, normal(5, 64), fused=1, dots=None, products=64)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("axis", [-1, -2])
def test_bits(bits, axis):
    check(lambda x, w: x @ w, normal(5, 96), weight(96, 64, bits=bits, axis=axis), fused=1)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_float_modes(mode):
    w = jaxq.quantize(normal(64, 96) / 96**0.5, mode=mode)
    check(lambda x, w: x @ w.T, X.astype(jnp.bfloat16), w, fused=1)


def test_preferred_element_type():
    def f(x, w):
        return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    check(f, X.astype(jnp.bfloat16), weight(64, 96, dtype=jnp.bfloat16), fused=1)


def test_narrower_result():
    def f(x, w):
        return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)

    check(f, X.astype(jnp.bfloat16), weight(64, 96, dtype=jnp.bfloat16), fused=1)


def test_cast_weights():
    check(lambda x, w: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16).T, X.astype(jnp.bfloat16), W, fused=1)


def test_dtype_of_weights():
    """float32 scales would promote bfloat16 activations; `dtype` says what the weights look like."""
    x = X.astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        assert jaxq.dispatch(lambda x, w: x @ w.T)(x, W).dtype == jnp.float32
    y = jaxq.dispatch(lambda x, w: x @ w.T, dtype=jnp.bfloat16)(x, W)
    assert y.dtype == jnp.bfloat16
    expected = x.astype(jnp.float32) @ W.dequantize().T
    assert float(jnp.abs(y.astype(jnp.float32) - expected).max()) <= bound(96, 2 * 96**0.5, dtype=jnp.bfloat16)


def test_both_quantized():
    """The smaller becomes dense, so that the larger is read once and small."""
    check(lambda a, b: a @ b.T, weight(32, 96), W, fused=1, dense_weights=1)


@pytest.mark.parametrize(
    ("f", "args"),
    [
        pytest.param(lambda x, w: jnp.einsum("i,oj->ioj", x, w), (normal(3), W), id="outer product"),
        pytest.param(lambda x, w: jnp.einsum("ec,ecd->ecd", x, w), (normal(3, 32), weight(3, 32, 32)), id="no sum"),
        pytest.param(lambda x, w: jnp.einsum("bk,nk->kbn", x, w), (X, W), id="the grouped axis is a batch axis"),
    ],
)
def test_stays_dense(f, args):
    check(f, *args, fused=0, dense_weights=1, dots=None)


def test_integers_stay_dense():
    def f(x, w):
        return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    check(f, jnp.arange(480, dtype=jnp.int8).reshape(5, 96) % 7, W, fused=0, dense_weights=1, dots=1)


@pytest.mark.parametrize("sizes", [[3, 0, 5], [2, 1, 2], [0, 0, 0], [8, 0, 0]])
@pytest.mark.parametrize("axis", [-1, -2])
def test_ragged_dot(sizes, axis):
    """Rows past the last group are zero, as `jax.lax.ragged_dot` has it."""
    experts = weight(3, 64, 32, axis=axis)

    def f(x, w, sizes):
        return lax.ragged_dot(x, w, sizes)

    check(f, normal(8, 64), experts, jnp.array(sizes, jnp.int32), fused=1)


def test_ragged_dot_gradient():
    experts = weight(3, 64, 32, axis=-2)
    sizes = jnp.array([3, 1, 4], jnp.int32)

    def f(x, w):
        return jnp.sum(jnp.sin(lax.ragged_dot(x, w, sizes)))

    expected = jax.grad(f)(normal(8, 64), dense(experts))
    for gradient in (jax.grad(jaxq.dispatch(f)), jaxq.dispatch(jax.grad(f))):
        got = jax.jit(gradient)(normal(8, 64), experts)
        assert float(jnp.abs(got - expected).max()) <= bound(64, 2 * 8.0, products=2)
        assert count(jax.make_jaxpr(gradient)(normal(8, 64), experts), "dequantize") == (0,)


def test_ragged_dot_transposed():
    """Contracting the experts' last axis."""
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )

    def f(x, w, sizes):
        return lax.ragged_dot_general(x, w, sizes, numbers)

    check(f, normal(8, 32), weight(3, 64, 32), jnp.array([3, 0, 5], jnp.int32), fused=1)


@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
@pytest.mark.parametrize(
    ("layout", "x_shape", "w_shape", "axis"),
    [
        (("NHWC", "HWIO", "NHWC"), (2, 5, 4, 32), (1, 1, 32, 48), -2),
        (("NCHW", "OIHW", "NCHW"), (2, 32, 5, 4), (48, 32, 1, 1), 1),
        (("NCHW", "HWIO", "HWNC"), (2, 32, 5, 4), (1, 1, 32, 48), -1),
    ],
)
def test_convolution_of_windows_of_one(layout, x_shape, w_shape, axis, strides):
    def f(x, w):
        return lax.conv_general_dilated(x, w, strides, "VALID", dimension_numbers=layout)

    tolerance = bound(32, 2 * 2 * 48**0.5)
    check(f, normal(*x_shape), weight(*w_shape, axis=axis), fused=1, tolerance=tolerance)


def test_convolution_of_wider_windows_is_dense():
    def f(x, w):
        return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))

    tolerance = bound(3 * 32, 2 * 2 * 96**0.5)
    check(f, normal(2, 5, 32), weight(3, 32, 48, axis=1), fused=0, dense_weights=1, tolerance=tolerance)


# ---- weights whose data MLX holds


RESIDENT = {
    "x @ w.T": (lambda x, w: x @ w.T, (64, 96), -1, 1),
    "x @ kernel": (lambda x, w: x @ w, (96, 64), -2, 1),
    "experts": (lambda x, w: jnp.einsum("bd,edf->bef", x[:, :64], w), (3, 64, 32), -2, 0),
    "experts with a batch axis": (lambda x, w: jnp.einsum("ebd,edf->ebf", x[:3, None], w), (3, 96, 32), -2, 1),
    "scan": (lambda x, w: lax.scan(lambda c, w: (jnp.tanh(c @ w.T), None), x, w)[0], (3, 96, 96), -1, 1),
    "rows": (lambda x, w: w[jnp.array([1, 5])], (64, 96), -1, 0),
    "reshape": (lambda x, w: x @ w.reshape(64, 96).T, (2, 32, 96), -1, 0),
}


@pytest.mark.parametrize("name", RESIDENT)
def test_resident_weights(name):
    """Multiplied, transposed and scanned where they are; not cut or rearranged."""
    if (reason := common.IMPLEMENTATIONS["mlx"].unavailable()) is not None:
        pytest.skip(reason)
    f, shape, axis, fused = RESIDENT[name]
    w = jaxq.quantize(normal(*shape) / shape[axis] ** 0.5, group_size=32, axis=axis)
    with jaxq.resident({"w": w}) as tree:
        run = jaxq.dispatch(lambda x, tree: f(x, tree["w"]))
        found = count(jax.make_jaxpr(run)(X, tree), "quantized_matmul", "dequantize")
        assert found == (fused, 1 - fused)
        # MLX multiplies in float32, in sums of another order.
        np.testing.assert_allclose(run(X, tree), f(X, dense(w)), atol=bound(96, 4 * 96**0.5, products=6))
