"""What is said where a weight becomes dense."""

from __future__ import annotations

import inspect
import warnings

import jax
import jax.numpy as jnp
import pytest
from dispatch_checks import normal, weight
from jax import lax

import jaxq
from jaxq import dispatch

X = normal(5, 96)
W = weight(64, 96)


def scaled(x, params):
    return x @ (params["head"]["w"] * 2.0).T  # the line that the messages must name


LINE = inspect.getsourcelines(scaled)[1] + 1
PARAMS = {"head": {"w": W}, "norm": jnp.ones(3)}


def test_error_names_operation_weight_and_line():
    with pytest.raises(ValueError) as caught:
        dispatch(scaled, fallback="error")(X, PARAMS)
    message = str(caught.value)
    assert message.startswith("dispatch: mul makes the weight params['head']['w'] (float32[64, 96], int4g16) dense")
    assert f"{__file__}:{LINE} (scaled)" in message and "no rule" in message


def test_warning_names_operation_weight_and_line():
    with pytest.warns(UserWarning, match=r"mul makes the weight params\['head'\]\['w'\]") as caught:
        dispatch(scaled, fallback="warn")(X, PARAMS)
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, LINE)]


def test_dequantize_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch(scaled)(X, PARAMS)


@pytest.mark.parametrize(
    "wrap",
    [
        jax.jit,
        jax.checkpoint,
        lambda f: lambda x, params: lax.cond(x.sum() > 0, f, f, x, params),
        lambda f: lambda x, params: lax.scan(lambda c, _: (c, f(x, params)), 0, None, length=2)[1],
        lambda f: lambda x, params: lax.map(lambda x: f(x, params), x),
    ],
    ids=["jit", "checkpoint", "cond", "scan", "map"],
)
def test_inside_nested_functions(wrap):
    with pytest.raises(ValueError, match=r"weight params\['head'\]\['w'\].*test_dispatch_fallback.py:\d+ \(scaled\)"):
        dispatch(wrap(scaled), fallback="error")(X, PARAMS)


def test_each_of_several_calls_is_told():
    """The second call of a cached function names its own weight."""
    inner = jax.jit(scaled)

    def f(x, a, b):
        return inner(x, {"head": {"w": a}}) + inner(x, {"head": {"w": b}})

    with pytest.warns(UserWarning) as caught:
        dispatch(f, fallback="warn")(X, W, W)
    names = [str(w.message).split("weight ")[1].split(" ")[0] for w in caught]
    assert names == ["a", "b"]


def name_of(f, *args, **kwargs):
    with pytest.raises(ValueError) as caught:
        dispatch(f, fallback="error")(*args, **kwargs)
    return str(caught.value).partition("the weight ")[2].partition(" (")[0]


def test_names():
    params = {"w": W}
    assert name_of(lambda x, w: x @ (w + 1.0).T, X, W) == "w"
    assert name_of(lambda *args: args[0] @ (args[1][0] + 1.0).T, X, [W]) == "args[1][0]"
    assert name_of(lambda x, **kw: x @ (kw["w"] + 1.0).T, X, w=W) == "w"
    assert name_of(lambda x: x @ (params["w"] + 1.0).T, X) == "params['w']"
    assert name_of(lambda x: x @ (W + 1.0).T, X) == "W"


class Layer:
    def __init__(self):
        self.w = W

    def __call__(self, x):
        return x @ (self.w + 1.0).T


def test_names_of_attributes():
    """A weight in an object that is no pytree is named by the variable that the code reads it from."""
    assert name_of(Layer(), X) == "self.w"


def test_look_ups_and_explicit_dequantization_are_no_fallback():
    def f(i, x, w):
        return (w[i] * 2.0, jnp.take(w, i, axis=0) + 1.0, w[3] + 1.0, w[i[0]] + 1.0)

    dispatch(f, fallback="error")(jnp.array([1, 2]), X, W)
    hidden = Layer()
    dispatch(lambda x: x + jaxq.dequantize(hidden.w)[:5] + hidden.w[3], fallback="error")(X)


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda x, w: x[:, :5] @ w[:, :5].T, "not made of whole groups of 16"),
        (lambda x, w: x @ w.astype(jnp.int32).astype(jnp.float32).T, "int32 is no float dtype"),
        (lambda x, w: jnp.einsum("bk,nk->kbn", x, w), "the grouped axis is a batch axis"),
        (lambda x, w: x @ jnp.broadcast_to(w.T, (2, 96, 64)), "repeated along an axis"),
        (lambda x, w: w.T[x[:, 0].astype(jnp.int32)], "quantize along the axis that is read whole"),
        (lambda x, w: w @ w.T, "both operands are quantized"),
        (lambda x, w: lax.scan(lambda c, r: (c + r, None), jnp.zeros(64), w.T)[0], "scanned over its grouped axis"),
    ],
)
def test_reasons(f, reason):
    with pytest.raises(ValueError, match=reason):
        dispatch(f, fallback="error")(X, W)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), TypeError, "dispatch: f is a int; pass a function"),
        ((scaled, {"fallback": "ignore"}), ValueError, "fallback='ignore' is unknown; pick one of dequantize, warn"),
        ((scaled, {"dtype": jnp.int8}), TypeError, "dtype=int8 is not supported; pick float32, float16 or bfloat16"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    f, options = (*arguments, {})[:2]
    with pytest.raises(error, match=message):
        dispatch(f, **options)
