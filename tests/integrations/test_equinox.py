"""Equinox models with quantized weights run as they are."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_checks import assert_close, count, dense_sizes

import jaxq
from jaxq.integrations import equinox as jaxq_equinox

SPECS = [jaxq.QuantSpec(4, 32), jaxq.QuantSpec(mode="nvfp4")]
INT4 = SPECS[0]
KEY = jax.random.key(0)


def inputs(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


class Attention(eqx.Module):
    """Embedding, attention, norm and a head, of Equinox's own layers."""

    embedding: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(96, 64, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(4, 64, use_output_bias=True, key=keys[1])
        self.norm = eqx.nn.LayerNorm(64)
        self.head = eqx.nn.Linear(64, 40, key=keys[2])

    def __call__(self, ids):
        h = jax.vmap(self.embedding)(ids)
        h = jax.vmap(self.norm)(h + self.attention(h, h, h))
        return jax.vmap(self.head)(h)


class Recurrent(eqx.Module):
    cell: eqx.Module

    def __call__(self, xs):
        first = self.cell.hidden_size
        state = jnp.zeros(first) if isinstance(self.cell, eqx.nn.GRUCell) else (jnp.zeros(first), jnp.zeros(first))
        state, _ = jax.lax.scan(lambda s, x: (self.cell(x, s), None), state, xs)
        return state[0] if isinstance(state, tuple) else state


MODELS = {
    # name: model, input, products, longest product
    "mlp": (eqx.nn.MLP(64, 32, 96, 2, activation=jax.nn.gelu, key=KEY), inputs(64), 3, 96),
    "attention": (Attention(KEY), jnp.arange(10) * 7, 5, 64),
    "gru": (Recurrent(eqx.nn.GRUCell(64, 32, key=KEY)), inputs(5, 64), 2, 64),
    "lstm": (Recurrent(eqx.nn.LSTMCell(64, 32, key=KEY)), inputs(5, 64), 2, 64),
    "sequential": (
        eqx.nn.Sequential(
            [eqx.nn.Linear(64, 64, key=KEY), eqx.nn.Lambda(jnp.tanh), eqx.nn.Linear(64, 32, use_bias=False, key=KEY)]
        ),
        inputs(64),
        2,
        64,
    ),
}


def call(model, x):
    return model(x)


def call_on(x):
    return lambda model: model(x)


@pytest.mark.parametrize(
    ("name", "spec"), [*((name, INT4) for name in MODELS), *((name, SPECS[1]) for name in ("mlp", "attention"))]
)
def test_outputs(name, spec):
    model, x, products, longest = MODELS[name]
    quantized = jaxq_equinox.quantize(model, spec)
    assert_close(eqx.filter_jit(call_on(x)), call_on(x), quantized, longest)
    jaxpr = eqx.filter_make_jaxpr(call)(quantized, x)[0]
    dots = count(eqx.filter_make_jaxpr(call)(model, x)[0])["dot_general"]
    assert count(jaxpr)["quantized_matmul"] == products
    assert count(jaxpr)["dot_general"] == dots - products
    # What is dequantized: the rows that the embedding looks up.
    assert dense_sizes(jaxpr) == ({10 * 64} if name == "attention" else set())


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_vmap(name):
    model, x, products, longest = MODELS[name]
    quantized = jaxq_equinox.quantize(model, INT4)
    xs = jnp.stack([x, x[::-1], x])
    assert_close(eqx.filter_jit(lambda m: jax.vmap(m)(xs)), lambda m: jax.vmap(m)(xs), quantized, longest)
    jaxpr = eqx.filter_make_jaxpr(lambda m, xs: jax.vmap(m)(xs))(quantized, xs)[0]
    assert count(jaxpr)["quantized_matmul"] == products


def test_without_jit():
    model, x, _, longest = MODELS["mlp"]
    quantized = jaxq_equinox.quantize(model, INT4)
    assert_close(call_on(x), call_on(x), quantized, longest)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_float_modes_keep_the_dtype_of_the_model(mode):
    embedding = eqx.nn.Embedding(64, 64, key=KEY)
    quantized = jaxq_equinox.quantize(embedding, jaxq.QuantSpec(mode=mode))
    assert isinstance(quantized, eqx.nn.Embedding) and quantized(3).dtype == jnp.float32
    np.testing.assert_array_equal(quantized(3), quantized.weight.dequantize("float32")[3])
    bf16 = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), embedding)
    assert jaxq_equinox.quantize(bf16, jaxq.QuantSpec(mode=mode))(3).dtype == jnp.bfloat16


def test_classes_and_paths_stay():
    model, report = Attention(KEY), jaxq.Report()
    quantized = jaxq_equinox.quantize(model, INT4, report=report)
    assert type(quantized) is Attention and type(quantized.head) is eqx.nn.Linear
    assert {row.path for row in report.quantized} == {
        "embedding/weight",
        "head/weight",
        *(f"attention/{name}_proj/weight" for name in ("query", "key", "value", "output")),
    }
    assert {row.path: row.note for row in report.skipped} == {
        "attention/output_proj/bias": "a vector",
        "norm/weight": "a vector",
        "norm/bias": "a vector",
        "head/bias": "a vector",
    }


def test_other_layers_are_left_and_say_so():
    class Model(eqx.Module):
        conv: eqx.nn.Conv1d
        norm: eqx.nn.WeightNorm
        own: jax.Array

        def __init__(self):
            self.conv = eqx.nn.Conv1d(64, 64, 1, key=KEY)
            self.norm = eqx.nn.WeightNorm(eqx.nn.Linear(64, 64, key=KEY))
            self.own = inputs(64, 64)

        def __call__(self, x):
            return self.norm(self.conv(x)[:, 0]) @ self.own

    report = jaxq.Report()
    model = Model()
    quantized = jaxq_equinox.quantize(model, INT4, report=report)
    notes = {row.path: row.note for row in report.skipped}
    assert not report.quantized
    assert "no weight of" in notes["conv/weight"] and "no weight of" in notes["own"]
    assert "WeightNorm" in notes["norm/layer/weight"]
    np.testing.assert_array_equal(quantized(inputs(64, 1)), model(inputs(64, 1)))
    asked = jaxq_equinox.quantize(model, [("^own$", INT4, -2)])
    np.testing.assert_allclose(
        asked(inputs(64, 1)),
        quantized.norm(model.conv(inputs(64, 1))[:, 0]) @ asked.own.dequantize(),
        # One product of length 64 in float32 with |x| and |w| below 4: 64 terms, each off by 64 * 2**-24.
        atol=64 * 16 * 64 * 2**-24,
    )


def test_rules_per_path():
    model = eqx.nn.MLP(64, 64, 64, 2, key=KEY)
    quantized = jaxq_equinox.quantize(model, [("layers/0/", jaxq.QuantSpec(8, 32)), ("layers/2/", INT4)])
    assert [getattr(layer.weight, "bits", None) for layer in quantized.layers] == [8, None, 4]


def test_stacked_layers_under_scan():
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(64, 64, key=key))(jax.random.split(KEY, 3))
    quantized = jaxq_equinox.quantize(layers, INT4)
    assert quantized.weight.shape == (3, 64, 64)

    def run(layers):
        dynamic, static = eqx.partition(layers, eqx.is_array)
        return jax.lax.scan(lambda h, d: (jnp.tanh(eqx.combine(d, static)(h)), None), inputs(64), dynamic)[0]

    assert_close(eqx.filter_jit(run), run, quantized, 64)
    jaxpr = eqx.filter_make_jaxpr(run)(quantized)[0]
    assert count(jaxpr)["quantized_matmul"] == 1 and not dense_sizes(jaxpr)


class Adapted(eqx.Module):
    base: eqx.nn.Linear
    down: jax.Array
    up: jax.Array

    def __call__(self, x):
        return self.base(x) + self.up @ (self.down @ x)


def test_filter_grad_of_adapters():
    adapted = Adapted(jaxq_equinox.quantize(eqx.nn.Linear(64, 48, key=KEY), INT4), inputs(4, 64), inputs(48, 4))
    adapters = eqx.tree_at(lambda m: (m.down, m.up), jax.tree.map(lambda _: False, adapted), (True, True))

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(trained, frozen, x):
        return (eqx.combine(trained, frozen)(x) ** 2).sum()

    found = gradient(*eqx.partition(adapted, adapters), inputs(64))
    assert found.base.weight is None or not jax.tree.leaves(found.base)
    dense = jaxq.dequantize_tree(adapted)
    mask = eqx.tree_at(lambda m: (m.down, m.up), jax.tree.map(lambda _: False, dense), (True, True))
    expected = gradient(*eqx.partition(dense, mask), inputs(64))
    y = np.abs(np.asarray(dense(inputs(64)))).max() + 64 * 4 * 4 * 64 * 2**-24
    for name in ("down", "up"):
        # 2 y and its adapter's other factor, each behind products of at most 64 terms below 16.
        bound = 2 * 4 * y * 64 * 16 * 64 * 2**-24
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=bound)


def test_filter_grad_of_everything_reaches_scales_and_biases():
    model = jaxq_equinox.quantize(eqx.nn.Linear(64, 48, key=KEY), INT4)
    x = inputs(64)
    grads = eqx.filter_grad(lambda m: m(x).sum())(model)
    # y = sum_k (scale * code + bias) x, so dy/dbias of a group is the sum of its x.
    groups = np.asarray(x, np.float64).reshape(2, 32).sum(-1)
    # 32 terms below 4 in float32
    np.testing.assert_allclose(grads.weight.biases, np.tile(groups, (48, 1)), atol=32 * 4 * 32 * 2**-24)
    assert grads.weight.scales.shape == (48, 2) and np.abs(grads.weight.scales).min() > 0


@pytest.mark.parametrize("spec", [INT4, jaxq.QuantSpec(mode="mxfp4")], ids=str)
def test_serialise(tmp_path, spec):
    model = jaxq_equinox.quantize(Attention(KEY), spec)
    path = tmp_path / "model.eqx"
    eqx.tree_serialise_leaves(path, model)
    skeleton = eqx.filter_eval_shape(lambda: jaxq_equinox.quantize(Attention(jax.random.key(1)), spec))
    loaded = eqx.tree_deserialise_leaves(path, skeleton)
    ids = jnp.arange(10)
    np.testing.assert_array_equal(loaded(ids), model(ids))


def test_nan_is_refused_by_path():
    model = eqx.nn.MLP(64, 64, 64, 1, key=KEY)
    model = eqx.tree_at(lambda m: m.layers[1].weight, model, model.layers[1].weight.at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="layers/1/weight holds a NaN"):
        jaxq_equinox.quantize(model, INT4)
