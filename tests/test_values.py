"""`dequantize` and `quantized_matmul` against float64, for every format, shape, dtype and implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import (
    DTYPES,
    IMPLEMENTATIONS,
    SHAPES,
    SPECS,
    activations,
    dequantize_bound,
    matmul_bound,
    refused,
    weight,
)

import jaxq


def check(y, expected, bound):
    assert y.shape == expected.shape
    error = np.abs(np.asarray(y, np.float64) - expected)
    assert (error <= bound).all(), f"largest error over its bound: {np.nanmax(error / bound)}"


def each(op, spec, implementation):
    """Whether to go on: a refusal must be an error that names the implementation."""
    return refused(implementation, op, spec) is None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_dequantize(spec, implementation):
    if not each("dequantize", spec, implementation):
        return
    for dtype in DTYPES:
        w = weight(spec, (13, 384), dtype)
        for out in DTYPES:
            y = jaxq.dequantize(w.qw, out, implementation=implementation)
            assert y.dtype == out
            check(y, w.dense, dequantize_bound(w.qw, w.dense, out))


@pytest.mark.parametrize("transpose", [True, False], ids=["transpose", "plain"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_quantized_matmul(spec, implementation, transpose):
    if not each("quantized_matmul", spec, implementation):
        return
    for i, (m, n, k) in enumerate(SHAPES):
        # Every pair of dtypes occurs over the shapes and formats, without running all of them everywhere.
        x_dtype, w_dtype = DTYPES[(i + spec.bits) % 3], DTYPES[(i + spec.group_size // 16) % 3]
        w = weight(spec, (n, k), w_dtype)
        x = activations((m, k if transpose else n), x_dtype)
        y = jaxq.quantized_matmul(x, w.qw, transpose=transpose, implementation=implementation)
        assert y.dtype == x.dtype
        expected = oracle.matmul(np.asarray(x), w.dense, transpose=transpose)
        check(y, expected, matmul_bound(x, w.qw, w.dense, transpose=transpose))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("x_shape", [(128,), (3, 128), (2, 3, 128), (2, 1, 3, 128)], ids=str)
def test_rank_of_x(x_shape, implementation):
    w = weight(jaxq.QuantSpec(4, 32), (40, 128))
    x = activations(x_shape)
    y = jaxq.quantized_matmul(x, w.qw, implementation=implementation)
    check(y, oracle.matmul(np.asarray(x), w.dense, transpose=True), matmul_bound(x, w.qw, w.dense, transpose=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("transpose", [True, False], ids=["transpose", "plain"])
@pytest.mark.parametrize(
    ("x_batch", "w_batch"),
    [((3,), (3,)), ((2, 3), (3,)), ((2, 3), (2, 1)), ((1,), (3,)), ((), (2, 3)), ((2, 1, 3), (4, 1)), ((0,), (1,))],
    ids=str,
)
def test_batched_weights_broadcast(x_batch, w_batch, transpose, implementation):
    w = weight(jaxq.QuantSpec(4, 32), (*w_batch, 24, 128))
    x = activations((*x_batch, 5, 128 if transpose else 24))
    y = jaxq.quantized_matmul(x, w.qw, transpose=transpose, implementation=implementation)
    expected = oracle.matmul(np.asarray(x), w.dense, transpose=transpose)
    check(y, expected, matmul_bound(x, w.qw, w.dense, transpose=transpose))


def test_batched_weights_take_a_vector():
    w = weight(jaxq.QuantSpec(4, 32), (2, 24, 128))
    x = activations((128,))
    y = jaxq.quantized_matmul(x, w.qw)
    assert y.shape == (2, 24)
    np.testing.assert_allclose(y, w.dense @ np.asarray(x, np.float64), rtol=0, atol=1e-4)


def test_rounds_once():
    """A sum that bf16 steps would lose: 1 + 256 * 2**-9, exact in float32 and in the bf16 result."""
    codes = np.ones((1, 256), np.int64)
    qw = jaxq.QuantizedArray.from_packed(
        jnp.asarray(oracle.pack(codes, 4)),
        jnp.full((1, 4), 2.0**-9, jnp.bfloat16),
        jnp.zeros((1, 4), jnp.bfloat16),
        bits=4,
        group_size=64,
    )
    x = jnp.ones((1, 256), jnp.bfloat16).at[0, 0].set(513)  # 513 rounds to 512 in bf16
    for implementation in IMPLEMENTATIONS:
        y = jaxq.quantized_matmul(x, qw, implementation=implementation)
        assert float(y[0, 0]) == 767 * 2.0**-9 == float(jnp.bfloat16(767 * 2.0**-9)) or float(y[0, 0]) == float(
            jnp.float32(767 * 2.0**-9).astype(jnp.bfloat16)
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_operators(implementation):
    w = weight(jaxq.QuantSpec(4, 32), (40, 128))
    x = activations((3, 128))
    expected = oracle.matmul(np.asarray(x), w.dense, transpose=True)
    bound = matmul_bound(x, w.qw, w.dense, transpose=True)
    with jaxq.use_implementation(implementation):
        check(x @ w.qw.T, expected, bound)
        check(np.asarray(x) @ w.qw.T, expected, bound)
        check(w.qw @ x.T, expected.T, bound.T)
        check(w.qw @ x[0], expected[0], bound[0])
        check(jax.jit(lambda x, qw: x @ qw.mT)(x, w.qw), expected, bound)
        y = activations((3, 40))
        plain = oracle.matmul(np.asarray(y), w.dense, transpose=False)
        check(y @ w.qw, plain, matmul_bound(y, w.qw, w.dense, transpose=False))
