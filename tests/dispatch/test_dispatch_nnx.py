"""Flax NNX modules whose parameters hold quantized weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from dispatch_checks import GROUP, assert_close, bound, counts, dense
from jax import lax

import jaxq
from jaxq import dispatch

nnx = pytest.importorskip("flax.nnx")

X = jax.random.normal(jax.random.key(0), (2, 8, 32))
TOLERANCE = bound(48, 2 * 2 * 48**0.5)


def quantized(kernel, axis=0):
    return jaxq.quantize(kernel, group_size=GROUP, axis=axis)


@pytest.fixture
def linear():
    """A module with a quantized kernel, its kernel, and what it computes."""
    module = nnx.Linear(32, 48, rngs=nnx.Rngs(0))
    kernel = quantized(module.kernel[...])
    module.kernel = nnx.Param(kernel)
    return module, kernel, X @ dense(kernel) + module.bias[...]


def test_split_and_merge(linear):
    module, _, expected = linear
    graph, state = nnx.split(module)
    run = dispatch(lambda state, x: nnx.merge(graph, state)(x), fallback="error")
    assert counts(run, state, X) == {"fused": 1, "dense": 0, "dots": 0}
    assert_close(jax.jit(run)(state, X), expected, TOLERANCE)
    assert_close(run(state, X), expected, TOLERANCE)


def test_module_as_argument(linear):
    module, _, expected = linear
    run = dispatch(lambda m, x: m(x), fallback="error")
    assert_close(run(module, X), expected, TOLERANCE)
    assert_close(jax.jit(run)(module, X), expected, TOLERANCE)
    assert_close(nnx.jit(run)(module, X), expected, TOLERANCE)


def test_module_as_function(linear):
    module, _, expected = linear
    for f in (module, module.__call__, lambda x: module(x)):
        run = dispatch(f, fallback="error")
        assert counts(run, X) == {"fused": 1, "dense": 0, "dots": 0}
        assert_close(run(X), expected, TOLERANCE)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=32, decode=False, rngs=rngs)
        self.linear = nnx.Linear(32, 32, rngs=rngs)

    def __call__(self, x):
        return x + self.linear(nnx.relu(self.attention(x)))


def test_scanned_blocks_with_attention():
    blocks = nnx.vmap(lambda key: Block(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 3))
    graph, state = nnx.split(blocks)

    def leaf(path, value):
        path = jax.tree_util.keystr(path)
        if "kernel" not in path:
            return value
        axis = (-3, -2) if "'out'" in path else -2 if "linear" in path else -3
        return quantized(value, axis)

    state = jax.tree_util.tree_map_with_path(leaf, state)

    def f(state, x):
        return lax.scan(lambda c, layer: (nnx.merge(graph, layer)(c), None), x, state)[0]

    run = dispatch(f, fallback="error")
    assert counts(run, state, X) == {"fused": 5, "dense": 0, "dots": 2}
    # Three blocks of five products; each adds at most its input again.
    assert_close(jax.jit(run)(state, X), jax.jit(f)(dense(state), X), 15 * 2 * TOLERANCE)


def test_lora():
    """Gradients of the adapters over a frozen quantized base."""
    module = nnx.LoRALinear(32, 48, lora_rank=4, rngs=nnx.Rngs(0))
    module.kernel = nnx.Param(quantized(module.kernel[...]))
    graph, lora, rest = nnx.split(module, nnx.LoRAParam, ...)

    def loss(lora, rest, x):
        return (nnx.merge(graph, lora, rest)(x) ** 2).mean()

    gradient = jax.grad(dispatch(loss, fallback="error"))
    assert counts(gradient, lora, rest, X)["fused"] == 1 and counts(gradient, lora, rest, X)["dense"] == 0
    assert_close(jax.jit(gradient)(lora, rest, X), jax.grad(loss)(lora, dense(rest), X), 4 * TOLERANCE)


def test_embedding():
    module = nnx.Embed(64, 32, rngs=nnx.Rngs(0))
    table = quantized(module.embedding[...], -1)
    module.embedding = nnx.Param(table)
    ids = jnp.array([1, 5, 63])
    run = dispatch(lambda m, ids: m.attend(m(ids)), fallback="error")
    assert counts(run, module, ids) == {"fused": 1, "dense": 1, "dots": 0}
    expected = dense(table)[ids] @ dense(table).T
    assert_close(jax.jit(run)(module, ids), expected, TOLERANCE)
