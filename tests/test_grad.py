"""Derivatives with respect to x, scales, biases and the dense weight."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FEW_SPECS, IMPLEMENTATIONS, activations, refused, weight
from jax.test_util import check_grads

import jaxq

quantized_matmul_module = importlib.import_module("jaxq.primitives.quantized_matmul")  # the package has its function

AFFINE = [spec for spec in FEW_SPECS if spec.is_affine]


def rebuilt(qw, scales, biases):
    return jaxq.QuantizedArray(qw.packed, scales, biases, spec=qw.spec, axis=qw.axis)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("transpose", [True, False], ids=["transpose", "plain"])
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("spec", AFFINE, ids=str)
def test_quantized_matmul(spec, batch, transpose, implementation):
    qw = weight(spec, (*batch, 6, 128)).qw
    x = activations((*batch, 3, 128 if transpose else 6))

    def f(x, scales, biases):
        return jaxq.quantized_matmul(x, rebuilt(qw, scales, biases), transpose=transpose, implementation=implementation)

    # The function is bilinear, so central differences have no truncation error, only rounding: about
    # 2**-24 * |y| / eps = 6e-8 * 40 / 1e-2 = 2e-4 a component, and |y| is at most a few tens here.
    check_grads(f, (x, qw.scales, qw.biases), order=2, modes=("fwd", "rev"), eps=1e-2, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", FEW_SPECS, ids=str)
def test_with_respect_to_x(spec, implementation):
    """A vector-Jacobian product is a product with the other orientation, in every format."""
    if refused(implementation, "quantized_matmul", spec):
        return
    w = weight(spec, (6, 128))
    x, ct = activations((3, 128)), activations((3, 6), seed=5)
    _, vjp = jax.vjp(lambda x: jaxq.quantized_matmul(x, w.qw, implementation=implementation), x)
    expected = np.asarray(ct, np.float64) @ w.dense
    np.testing.assert_allclose(vjp(ct)[0], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    hessian = jax.hessian(lambda x: jnp.sum(jnp.square(jaxq.quantized_matmul(x, w.qw))))(x[0])
    expected = 2 * w.dense.T @ w.dense
    np.testing.assert_allclose(hessian, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_the_backward_pass_is_quantized():
    qw = weight(jaxq.QuantSpec(4, 64), (6, 128)).qw
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(jnp.sin(x @ qw.T))))(activations((3, 128)))
    names = [e.primitive.name for e in jaxpr.eqns]
    assert names.count("quantized_matmul") == 2
    assert "dot_general" not in names and "dequantize" not in names


def test_packed_has_a_float0_cotangent():
    qw = weight(jaxq.QuantSpec(4, 64), (6, 128)).qw
    gradient = jax.grad(lambda qw: jnp.sum(activations((3, 128)) @ qw.T), allow_int=True)(qw)
    assert isinstance(gradient, jaxq.QuantizedArray)
    assert gradient.packed.dtype == jax.dtypes.float0
    assert gradient.scales.shape == qw.scales.shape and gradient.biases.shape == qw.biases.shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cotangents_keep_their_dtypes(dtype):
    qw = weight(jaxq.QuantSpec(4, 64), (6, 128), dtype).qw
    x = activations((3, 128))
    dx, dscales, dbiases = jax.grad(
        lambda x, s, b: jnp.sum(jaxq.quantized_matmul(x, rebuilt(qw, s, b))), argnums=(0, 1, 2)
    )(x, qw.scales, qw.biases)
    assert (dx.dtype, dscales.dtype, dbiases.dtype) == (x.dtype, dtype, dtype)


def of_parameters(x, qw, transpose):
    """The gradient of some function of the product, for scales and biases."""

    def f(scales, biases):
        return jnp.sum(jnp.sin(jaxq.quantized_matmul(x, rebuilt(qw, scales, biases), transpose=transpose)))

    return jax.grad(f, argnums=(0, 1))(qw.scales, qw.biases)


@pytest.mark.parametrize("transpose", [True, False], ids=["transpose", "plain"])
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("rows", [12, 13])
def test_the_cotangent_of_a_large_weight_is_made_in_parts(rows, batch, transpose, monkeypatch):
    qw = weight(jaxq.QuantSpec(4, 64), (*batch, rows, 128)).qw
    x = activations((*batch, 2, 3, 128 if transpose else rows))

    def gradients(x):
        first = of_parameters(x, qw, transpose)
        return *first, jax.grad(lambda x: sum(map(jnp.sum, of_parameters(x, qw, transpose))))(x)

    *whole, whole_second = jax.jit(lambda x: gradients(x))(x)
    # In five parts, for 13 rows with some left over.
    monkeypatch.setattr(quantized_matmul_module, "_SLOPE_ENTRIES", qw.size // 5)
    assert "scan" in {eqn.primitive.name for eqn in jax.make_jaxpr(lambda x: of_parameters(x, qw, transpose))(x).eqns}
    *parts, parts_second = jax.jit(lambda x: gradients(x))(x)
    # The same sums of 6 products each, and of 64 times codes up to 15, in another order perhaps.
    for got, expected in zip(parts, whole, strict=True):
        np.testing.assert_allclose(got, expected, atol=(6 + 64) * 2**-23 * 64 * 15 * 6 * float(jnp.abs(x).max()))
    # Sums of thousands of such, of both signs.
    np.testing.assert_allclose(parts_second, whole_second, atol=1e-4 * np.abs(whole_second).max())


@pytest.mark.parametrize("transpose", [True, False], ids=["transpose", "plain"])
def test_memory_of_the_gradient_of_scales_and_biases(transpose):
    """No array of the size of the dense weight: 64 MiB here, of which 4 exist at a time, and codes beside them."""
    groups = jnp.ones((4096, 64))
    qw = jaxq.QuantizedArray.from_packed(jnp.zeros((4096, 512), "uint32"), groups, groups, bits=4, group_size=64)
    implementation = next((name for name in ("cpu", "mlx") if name in IMPLEMENTATIONS), None)
    if implementation is None:
        pytest.skip("plain XLA makes the weight dense for the product itself")
    with jaxq.use_implementation(implementation):
        compiled = jax.jit(of_parameters, static_argnums=2).lower(activations((8, 4096)), qw, transpose).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * qw.size / 4


@pytest.mark.parametrize("spec", AFFINE, ids=str)
def test_dequantize(spec):
    qw = weight(spec, (6, 128)).qw
    check_grads(
        lambda s, b: jaxq.dequantize(rebuilt(qw, s, b)), (qw.scales, qw.biases), order=2, eps=1e-2, atol=5e-3, rtol=5e-3
    )


def test_float_modes_have_no_weight_gradient():
    qw = weight(jaxq.QuantSpec(mode="mxfp4"), (6, 128)).qw
    gradient = jax.grad(lambda qw: jnp.sum(jaxq.dequantize(qw, jnp.float32)), allow_int=True)(qw)
    assert gradient.scales.dtype == jax.dtypes.float0


def test_quantize():
    """Codes are piecewise constant; the derivative is that of the scales and biases, which follow the group's edge.

    A step of 1e-3 in one weight of 128 moves the others' codes past no boundary for this seed, so differences of the
    dequantized weight agree with the derivative.
    """
    w = activations((2, 64))
    direction = activations((2, 64), seed=9)

    def params(w):
        qw = jaxq.quantize(w, bits=4, group_size=32)
        return qw.scales, qw.biases

    (scales, biases), tangents = jax.jvp(params, (w,), (direction,))
    step = 2.0**-10
    forward, backward = params(w + step * direction), params(w - step * direction)
    for tangent, high, low, value in zip(tangents, forward, backward, (scales, biases), strict=True):
        difference = (np.asarray(high, np.float64) - np.asarray(low, np.float64)) / (2 * step)
        # Rounding of the two values, divided by the step.
        np.testing.assert_allclose(tangent, difference, rtol=0, atol=float(np.abs(value).max()) * 2.0**-23 / step)
    jax.grad(lambda w: sum(jnp.sum(p) for p in params(w)))(w)


def test_a_value_quantized_in_a_trace_feeds_a_product_of_the_same_trace():
    w, x = activations((6, 128)), activations((3, 128))

    @jax.jit
    def f(w, x):
        return x @ jaxq.quantize(w, bits=8).T

    np.testing.assert_array_equal(f(w, x), x @ jaxq.quantize(w, bits=8).T)
    jax.jit(jax.grad(lambda w, x: jnp.sum(f(w, x)), argnums=(0, 1)))(w, x)
