"""Flax Linen models, as they are, on quantized variables."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from dispatch_checks import GROUP, assert_close, bound, counts, dense

import jaxq
from jaxq import dispatch

nn = pytest.importorskip("flax.linen")

IDS = jnp.arange(16).reshape(2, 8)
KEY = jax.random.key(0)


def quantize(variables: Any, axes: dict[str, Any]) -> Any:
    """Quantizes the leaves whose path ends in one of the keys, along those axes; bf16 and f32 leaves alike."""

    def leaf(path: Any, value: Any) -> Any:
        name = "/".join(str(getattr(part, "key", part)) for part in path)
        for ending, axis in axes.items():
            if name.endswith(ending):
                return jaxq.quantize(value, group_size=GROUP, axis=axis)
        return value

    return jax.tree_util.tree_map_with_path(leaf, variables)


class Model(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, ids, train=False):
        h = nn.Embed(64, 32, dtype=self.dtype)(ids)
        h = nn.LayerNorm(dtype=self.dtype)(h)
        h = nn.relu(nn.Dense(48, dtype=self.dtype)(h))
        h = nn.Dropout(0.1, deterministic=not train)(h)
        h = nn.remat(nn.Dense)(32, dtype=self.dtype)(h)
        h = h + nn.MultiHeadDotProductAttention(num_heads=2, dtype=self.dtype, qkv_features=32)(h)
        h = nn.DenseGeneral((2, 16), dtype=self.dtype)(h)
        h = nn.DenseGeneral(32, axis=(-2, -1), dtype=self.dtype)(h)
        return nn.Einsum((32, 48), "...i,ij->...j", dtype=self.dtype)(h)


# Attention contracts the first axis of its inputs' kernels [D, H, K] and the first two of its output's [H, K, D].
AXES = {"embedding": -1, "out/kernel": (0, 1), "DenseGeneral_1/kernel": (0, 1), "kernel": 0}


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax relies on it in bfloat16."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_model(dtype):
    model = Model(dtype)
    variables = quantize(jax.jit(model.init)(KEY, IDS), AXES)
    expected = jax.jit(model.apply)(dense(variables), IDS)
    run = dispatch(model.apply, fallback="error")
    # Dense, Dense, four of the attention, DenseGeneral twice, Einsum; the look-up of the embedding; and the
    # attention's two dots of activations.
    assert counts(run, variables, IDS) == {"fused": 9, "dense": 1, "dots": 2}
    got = jax.jit(run)(variables, IDS)
    # Nine layers, each with |w| < 2 and its inputs near unit variance: |x| < 2 * sqrt(48).
    assert_close(got, expected, bound(48, 2 * 2 * 48**0.5, products=9, dtype=dtype or jnp.float32))


def test_dropout():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dropout(0.5, deterministic=not train)(nn.Dense(32)(x))

    model, x = Dropped(), jnp.ones((2, 48))
    variables = quantize(model.init(KEY, x, False), {"kernel": 0})

    def apply(v, x):
        return model.apply(v, x, train=True, rngs={"dropout": KEY})

    got = jax.jit(dispatch(apply, fallback="error"))(variables, x)
    assert_close(got, apply(dense(variables), x), 2 * bound(48, 2 * 48**0.5))


def test_closed_over_variables():
    """Flax compares the shapes of all leaves with those that it would initialize."""
    model = nn.Dense(32)
    x = jnp.ones((2, 48))
    variables = quantize(model.init(KEY, x), {"kernel": 0})
    got = dispatch(lambda x: model.apply(variables, x), fallback="error")(x)
    assert_close(got, model.apply(dense(variables), x), bound(48, 2 * 48**0.5))


class Block(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return carry + nn.Dense(32)(nn.gelu(nn.Dense(48)(carry))), None


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(64, 32)
        h = embed(ids)
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=4,
        )
        h, _ = layers()(h, None)
        return embed.attend(h)


def test_scanned_layers_and_tied_head():
    model = Tied()
    variables = quantize(jax.jit(model.init)(KEY, IDS), {"embedding": -1, "kernel": -2})
    expected = jax.jit(model.apply)(dense(variables), IDS)
    run = dispatch(model.apply, fallback="error")
    assert counts(run, variables, IDS) == {"fused": 3, "dense": 1, "dots": 0}
    assert_close(jax.jit(run)(variables, IDS), expected, bound(48, 2 * 4 * 48**0.5, products=9))


def test_mutable_collections():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.Dense(32)(x))

    model, x = Normed(), jax.random.normal(KEY, (8, 48))
    variables = quantize(model.init(KEY, x), {"kernel": 0})

    def apply(v, x):
        return model.apply(v, x, mutable=["batch_stats"])

    run = dispatch(apply)
    assert counts(run, variables, x) == {"fused": 1, "dense": 0, "dots": 0}
    # Normalizing divides by the deviation of 8 values of variance near 1, more than 1/4.
    assert_close(jax.jit(run)(variables, x), apply(dense(variables), x), 4 * bound(48, 2 * 2 * 48**0.5))


def test_gradient_of_the_other_parameters():
    model, x = nn.Dense(32), jax.random.normal(KEY, (8, 48))
    params = quantize(model.init(KEY, x), {"kernel": 0})["params"]

    def loss(apply):
        def of(bias, kernel, x):
            return jnp.sum(jnp.sin(apply({"params": {"kernel": kernel, "bias": bias}}, x)))

        return of

    got = jax.jit(jax.grad(loss(dispatch(model.apply))))(params["bias"], params["kernel"], x)
    expected = jax.grad(loss(model.apply))(params["bias"], dense(params["kernel"]), x)
    assert_close(got, expected, 8 * bound(48, 2 * 2 * 48**0.5))
