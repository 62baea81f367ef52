"""Nothing is compiled per call, and what was traced once is kept."""

from __future__ import annotations

import gc
import weakref

import jax
import jax.numpy as jnp
import pytest
from dispatch_checks import normal, weight
from jax import lax

import jaxq
from jaxq import dispatch
from jaxq.dispatch import interpreter

X = normal(5, 96)
W = weight(96, 96)
LAYERS = weight(3, 96, 96)


@pytest.fixture
def compiles():
    """How many programs JAX has compiled since."""
    events = []

    def record(event, *_, **__):
        return events.append(event) if event == "/jax/core/compile/backend_compile_duration" else None

    jax.monitoring.register_event_duration_secs_listener(record)
    yield lambda: len(events)
    jax.monitoring.unregister_event_duration_listener(record)


@jax.jit
def jitted(x, w):
    return jnp.tanh(x @ w.T)


def body(c, w):
    return jnp.tanh(c @ w.T), None


def scanned(x, w):
    return lax.scan(body, x, w)[0]


@jax.checkpoint
def checkpointed(x, w):
    return jnp.tanh(x @ w.T)


EAGER = {
    "plain": (lambda x, w: jnp.tanh(x @ w.T), W),
    "jit": (jitted, W),
    "scan": (scanned, LAYERS),
    "checkpoint": (checkpointed, W),
    "custom_jvp": (lambda x, w: jax.nn.relu(jitted(x, w)), W),
    "gradient of jit": (jax.grad(lambda x, w: jitted(x, w).sum()), W),
    "vmap of jit": (jax.vmap(jitted, (None, 0)), LAYERS),
}


@pytest.mark.parametrize("name", EAGER)
def test_no_compilation_in_later_calls(compiles, name):
    """Outside of jit: the second call runs what the first compiled."""
    f, w = EAGER[name]
    run = dispatch(f)
    run(X, w)
    before = compiles()
    run(X, w)
    dispatch(f)(X, w)
    assert compiles() == before


def _new(f, compiles):
    before = compiles()
    f()
    return compiles() - before


def test_cond_and_while_are_compiled_once(compiles):
    taken, skipped = lambda x, w: x @ w.T, lambda x, w: x
    condition, step = lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ s[2].T), s[2])

    def branch(x, w):
        return lax.cond(x[0, 0] > 0, taken, skipped, x, w)

    def loop(x, w):
        return lax.while_loop(condition, step, (0, x, w))[1]

    for f in (jax.jit(branch), jax.jit(loop)):
        run = dispatch(f)
        run(X, W)
        assert _new(lambda run=run: run(X, W), compiles) == 0


def test_jit_traces_once():
    traces = []

    def f(x, w):
        traces.append(1)
        return x @ w.T

    run = jax.jit(dispatch(f))
    for scale in (1.0, 2.0):
        run(X * scale, W)
    assert len(traces) == 1
    run(X[:2], W)
    assert len(traces) == 2


def test_inner_jit_is_traced_once():
    traces = []

    @jax.jit
    def inner(x, w):
        traces.append(1)
        return x @ w.T

    run = dispatch(lambda x, w: inner(inner(x, w), w))
    run(X, W)
    run(X, W)
    assert len(traces) == 1


def test_repeated_layers_share_one_jaxpr():
    """A layer that is called 24 times with weights of the same form is evaluated, and lowered, once."""

    def model(x, layers):
        for w in layers:
            x = jitted(x, w)
        return x

    jaxpr = jax.make_jaxpr(dispatch(model))(X, [W] * 24)
    inner = {id(eqn.params["jaxpr"]) for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "jit"}
    assert len(inner) == 1
    text = jax.jit(dispatch(model)).lower(X, [W] * 24).as_text()
    assert text.count("func.func private @jitted") == 1


def test_forms_are_told_apart():
    """The same inner function with weights of other formats, axes and dtypes."""
    other = weight(96, 96, bits=8)
    run = dispatch(lambda x, a, b: (jitted(x, a), jitted(x, b), jitted(x, a.T), jitted(x, b.T)))
    for got, w in zip(run(X, W, other), (W, other, W.T, other.T), strict=True):
        assert jnp.allclose(got, jnp.tanh(X @ jaxq.dequantize(w).T), atol=1e-3)


def test_implementations_are_told_apart():
    run = dispatch(jitted)
    plain = str(jax.make_jaxpr(run)(X, W))
    with jaxq.use_implementation("xla"):
        chosen = str(jax.make_jaxpr(run)(X, W))
    assert "implementation=None" in plain and "implementation=xla" in chosen


def test_cache_lets_go():
    """What was kept about a function goes with it, custom derivatives included."""

    def make():
        @jax.custom_jvp
        def f(x, w):
            return x @ w.T

        f.defjvp(lambda p, t: (f(*p), t[0] @ p[1].T))
        inner = jax.jit(lambda x, w: f(x, w) + lax.scan(body, x, w[None])[0])
        jaxpr = inner.trace(X, jaxq.dequantize(W)).jaxpr
        dispatch(inner)(X, W)
        return inner, weakref.ref(jaxpr)

    size = len(interpreter._traced)
    inner, _ = make()
    assert len(interpreter._traced) > size
    del inner
    jax.clear_caches()
    gc.collect()
    assert len(interpreter._traced) <= size
