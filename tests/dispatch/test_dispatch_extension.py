"""Rules for primitives of others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dispatch_checks import assert_close, bound, count, dense, normal, weight
from jax.extend.core import Primitive
from jax.interpreters import mlir

import jaxq
from jaxq import dispatch, register_dispatch_rule
from jaxq.dispatch.interpreter import RULES

X = normal(5, 96)
W = weight(64, 96)
TOLERANCE = bound(96, 2 * 96**0.5)


def make(name, function, *, multiple_results=False):
    primitive = Primitive(name)
    primitive.multiple_results = multiple_results
    primitive.def_impl(function)

    def abstract_eval(*avals):
        out = jax.eval_shape(function, *avals)

        def shaped(o):
            return jax.core.ShapedArray(o.shape, o.dtype)

        return [shaped(o) for o in out] if multiple_results else shaped(out)

    primitive.def_abstract_eval(abstract_eval)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=multiple_results))
    return primitive


@pytest.fixture
def linear_p():
    primitive = make("linear", lambda x, w: x @ w.T)
    yield primitive
    RULES.pop(primitive, None)


def test_without_a_rule_it_is_dense(linear_p):
    def f(x, w):
        return linear_p.bind(x, w)

    assert count(jax.make_jaxpr(dispatch(f))(X, W), "linear", "dequantize") == (1, 1)
    with pytest.raises(ValueError, match="linear makes the weight w"):
        dispatch(f, fallback="error")(X, W)


def test_rule(linear_p):
    seen = []

    @register_dispatch_rule(linear_p)
    def rule(eqn, operands):
        x, w = operands
        if not jaxq.is_quantized(w):
            return NotImplemented
        seen.append((w.shape, eqn.invars[1].aval.dtype))
        return jaxq.quantized_matmul(x, w, transpose=w.axis == (-1,))

    for w, axis in ((W, (-1,)), (weight(64, 96, axis=0), (-2,))):
        run = dispatch(lambda x, w: linear_p.bind(x, w))
        assert count(jax.make_jaxpr(run)(X, w), "linear", "quantized_matmul", "dequantize") == (0, 1, 0)
        assert_close(jax.jit(run)(X, w), X @ dense(w).T, TOLERANCE)
        assert seen[-1] == ((64, 96), jnp.float32) and w.axis == axis
    # Under jit inside, too; and where the rule does not serve, the weight is dense.
    run = dispatch(jax.jit(lambda x, w: linear_p.bind(x, w)))
    assert count(jax.make_jaxpr(run)(X, W), "quantized_matmul") == (1,)
    with pytest.raises(ValueError, match="does not cover this case"):
        dispatch(lambda x, w: linear_p.bind(w, x), fallback="error")(X, W)


def test_rule_gets_the_weight_as_the_code_sees_it(linear_p):
    @register_dispatch_rule(linear_p)
    def rule(eqn, operands):
        x, w = operands
        assert w.shape == eqn.invars[1].aval.shape
        np.testing.assert_allclose(w.dequantize(), expected, rtol=1e-6)
        return x @ w.dequantize().T

    stack = weight(3, 32, 96)
    for view in (lambda w: w[1], lambda w: w[2].T, lambda w: w.reshape(96, 96), lambda w: w[:, 1:17].reshape(48, 96)):
        expected = view(dense(stack))
        dispatch(lambda w: linear_p.bind(jnp.ones((2, view(w).shape[1])), view(w)))(stack)  # noqa: B023
    expected = dense(stack).transpose(1, 0, 2)
    einsum_p = make("heads", lambda w: w.sum(-1))

    @register_dispatch_rule(einsum_p)
    def heads(eqn, operands):
        np.testing.assert_allclose(operands[0].dequantize(), expected, rtol=1e-6)
        return operands[0].dequantize().sum(-1)

    dispatch(lambda w: einsum_p.bind(w.transpose(1, 0, 2)))(stack)


def test_rule_that_returns_weights():
    primitive = make("halves", lambda w: [w[:32], w[32:]], multiple_results=True)
    register_dispatch_rule(primitive)(lambda eqn, operands: [operands[0][:32], operands[0][32:]])
    run = dispatch(lambda x, w: [x @ half.T for half in primitive.bind(w)])
    assert count(jax.make_jaxpr(run)(X, W), "quantized_matmul", "dequantize") == (2, 0)
    assert_close(run(X, W), [X @ dense(W)[:32].T, X @ dense(W)[32:].T], TOLERANCE)


@pytest.mark.parametrize("wrong", [lambda x: x, lambda x: [x, x], lambda x: (x @ dense(W).T).astype(jnp.bfloat16)])
def test_wrong_results_are_refused(linear_p, wrong):
    register_dispatch_rule(linear_p)(lambda eqn, operands: wrong(operands[0]))
    with pytest.raises((ValueError, TypeError), match=r"registered for linear|list"):
        dispatch(lambda x, w: linear_p.bind(x, w))(X, W)


def test_wrong_primitive():
    with pytest.raises(TypeError, match="primitive='dot' is a str; pass a jax"):
        register_dispatch_rule("dot")
