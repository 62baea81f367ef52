"""Linen models run under jaxq.dispatch on quantized variables."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from model_checks import assert_close, count, dense_sizes

import jaxq

INT4 = jaxq.QuantSpec(4, 32)
KEY = jax.random.key(0)
IDS = jnp.arange(10).reshape(2, 5) * 9


def inputs(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


class Block(nn.Module):
    """One layer of a stack, as nn.scan wants it."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=64)(h)
        return x + nn.Dense(64)(nn.gelu(nn.Dense(96)(nn.LayerNorm()(x)))), None


class Language(nn.Module):
    """An embedding, layers under nn.scan and nn.remat or one by one, and the embedding again as the head."""

    scanned: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(96, 64)
        x = embed(ids)
        block = nn.remat(Block, prevent_cse=not self.scanned) if self.remat else Block
        if self.scanned:
            stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = stack()(x, None)
        else:
            for _ in range(2):
                x, _ = block()(x, None)
        return embed.attend(nn.LayerNorm()(x))


class Products(nn.Module):
    """The other layers that multiply by a weight."""

    @nn.compact
    def __call__(self, x):
        h = nn.DenseGeneral((2, 32))(x)
        h = nn.DenseGeneral(64, axis=(-2, -1))(h)
        h = nn.Einsum((64, 4, 32), "btd,dnh->btnh", use_bias=False)(h)
        h = nn.Einsum((4, 32, 64), "btnh,nhd->btd", use_bias=False)(h)
        return nn.Einsum((64, 48), "btd,df->btf")(h)


class Stack(nn.Module):
    """Layers of one shape, stacked by nn.scan: their kernels and biases have an axis of layers in front."""

    @nn.compact
    def __call__(self, x):
        def layer(model, x, _):
            h = nn.DenseGeneral((2, 32), name="up")(nn.Dense(64, name="mix")(x))
            return x + nn.DenseGeneral(64, axis=(-2, -1), name="down")(h), None

        return nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(self, x, None)[0]


PRODUCTS_RULES = [
    ("DenseGeneral_0/kernel", INT4, -3),
    ("DenseGeneral_1/kernel", INT4, (-3, -2)),
    ("Einsum_1", INT4, (-3, -2)),
    ("Einsum", INT4),
]

MODELS = {
    # name: model, input, rules, products with weights in the jaxpr, longest product
    "dense": (nn.Dense(96), inputs(3, 64), INT4, 1, 64),
    "products": (Products(), inputs(2, 3, 64), INT4, 5, 128),
    "products by rules": (Products(), inputs(2, 3, 64), PRODUCTS_RULES, 5, 128),
    "stack": (Stack(), inputs(2, 3, 64), INT4, 3, 64),
    "language": (Language(), IDS, INT4, 13, 96),
    # A scan's body stands once in a jaxpr.
    "scan of remat": (Language(scanned=True, remat=True), IDS, INT4, 7, 96),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs(name):
    model, x, rules, products, longest = MODELS[name]
    variables = model.init(KEY, x)
    quantized = jaxq.quantize_tree(variables, rules)
    run = jax.jit(jaxq.dispatch(model.apply, fallback="error"))
    assert_close(lambda tree: run(tree, x), lambda tree: model.apply(tree, x), quantized, longest)
    jaxpr = jax.make_jaxpr(jaxq.dispatch(model.apply))(quantized, x)
    dots = count(jax.make_jaxpr(model.apply)(variables, x))["dot_general"]
    assert count(jaxpr)["quantized_matmul"] == products
    assert count(jaxpr)["dot_general"] == dots - products
    # What is dequantized: the rows that the embedding looks up.
    assert dense_sizes(jaxpr) == ({10 * 64} if isinstance(model, Language) else set())


def test_float_modes_with_a_dtype():
    model, x = nn.Dense(96), inputs(3, 64)
    quantized = jaxq.quantize_tree(model.init(KEY, x), jaxq.QuantSpec(mode="mxfp4"))
    run = jax.jit(jaxq.dispatch(model.apply, dtype="float32", fallback="error"))
    assert_close(lambda tree: run(tree, x), lambda tree: model.apply(tree, x), quantized, 64)


def test_gradients_of_what_is_dense():
    model = Language()
    quantized = jaxq.quantize_tree(model.init(KEY, IDS), INT4)
    norm = quantized["params"]["LayerNorm_0"]

    def loss(norm, variables, apply):
        return (apply({"params": {**variables["params"], "LayerNorm_0": norm}}, IDS) ** 2).mean()

    fused = jaxq.dispatch(model.apply)
    found = jax.jit(jax.grad(lambda n, v: loss(n, v, fused)))(norm, quantized)
    expected = jax.jit(jax.grad(lambda n, v: loss(n, v, model.apply)))(norm, jaxq.dequantize_tree(quantized))
    for name, value in expected.items():
        # 14 products in a row on the way there and as many on the way back, each off by at most gamma_96 of its terms'
        # sum; 96 * 2**-24 of the largest entry each, and cancellation of at most a factor of 32.
        scale = np.abs(np.asarray(value)).max()
        np.testing.assert_allclose(found[name], value, atol=28 * 96 * 2**-24 * 32 * scale)


def test_partitioned_parameters():
    """Flax's boxes that say how a parameter is sharded keep doing so."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model, x = nn.Dense(96, kernel_init=init), inputs(3, 64)
    quantized = jaxq.quantize_tree(model.init(KEY, x), INT4)
    box = quantized["params"]["kernel"]
    assert isinstance(box, nn.Partitioned) and jaxq.is_quantized(box.value) and box.value.axis == (-2,)
    run = jax.jit(jaxq.dispatch(model.apply, fallback="error"))
    assert_close(lambda tree: run(tree, x), lambda tree: model.apply(tree, x), quantized, 64)


def test_without_dispatch_it_says_what_to_do():
    model, x = nn.Dense(96), inputs(3, 64)
    quantized = jaxq.quantize_tree(model.init(KEY, x), INT4)
    with pytest.raises(Exception, match=r"shape|jaxq\.dispatch"):
        model.apply(quantized, x)


@pytest.mark.parametrize("spec", [INT4, jaxq.QuantSpec(mode="nvfp4")], ids=str)
def test_orbax(tmp_path, spec):
    model = Language(scanned=True)
    quantized = jaxq.quantize_tree(model.init(KEY, IDS), spec)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "variables", quantized)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(lambda: jaxq.quantize_tree(model.init(KEY, IDS), spec))
        restored = checkpointer.restore(tmp_path / "variables", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(quantized)
    jax.tree.map(np.testing.assert_array_equal, restored, quantized)
