"""NNX modules with quantized weights run as they are."""

from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from model_checks import assert_close, count, dense_sizes

import jaxq
from jaxq.integrations import flax as jaxq_flax

INT4 = jaxq.QuantSpec(4, 32)
SPECS = [INT4, jaxq.QuantSpec(mode="nvfp4")]


def inputs(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


class Block(nnx.Module):
    """A transformer's block of Flax's own layers."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=64, decode=False, rngs=rngs)
        self.up = nnx.Linear(64, 96, rngs=rngs)
        self.down = nnx.Linear(96, 64, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Language(nnx.Module):
    """An embedding, a block, and the embedding again as the head."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(96, 64, rngs=rngs)
        self.block = Block(rngs)

    def __call__(self, ids):
        return self.embed.attend(self.block(self.embed(ids)))


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


IDS = jnp.arange(10).reshape(2, 5) * 9
MODELS = {
    # name: how to make it, input, products with weights, longest product
    "linear": (lambda: nnx.Linear(64, 96, rngs=rngs()), inputs(3, 64), 1, 64),
    # Four heads of 8 in, in which no group fits: grouped along what comes out.
    "general, small heads": (lambda: nnx.LinearGeneral((4, 8), 64, axis=(-2, -1), rngs=rngs()), inputs(3, 4, 8), 1, 32),
    "general": (lambda: nnx.LinearGeneral((2, 32), (4, 16), axis=(-2, -1), rngs=rngs()), inputs(3, 2, 32), 1, 64),
    "batched": (
        lambda: nnx.LinearGeneral(64, 32, axis=-1, batch_axis={0: 3}, rngs=rngs()),
        inputs(3, 5, 64),
        1,
        64,
    ),
    "einsum": (lambda: nnx.Einsum("btd,dnh->btnh", (64, 2, 32), (2, 32), rngs=rngs()), inputs(2, 3, 64), 1, 64),
    "pointwise": (lambda: nnx.Conv(64, 48, (1, 1), strides=(2, 1), rngs=rngs()), inputs(2, 5, 4, 64), 1, 64),
    "lora": (lambda: nnx.LoRALinear(64, 96, lora_rank=4, rngs=rngs()), inputs(3, 64), 1, 64),
    "language": (lambda: Language(rngs()), IDS, 7, 96),
}


def functional(module):
    """The module as a function of its state, and that state."""
    graph, state = nnx.split(module)
    return lambda state, x: nnx.merge(graph, state)(x), state


@pytest.mark.parametrize(
    ("name", "spec"), [*((name, INT4) for name in MODELS), *((name, SPECS[1]) for name in ("linear", "language"))]
)
def test_outputs(name, spec):
    make, x, products, longest = MODELS[name]
    reference, _ = functional(make())
    module = make()
    assert jaxq_flax.quantize(module, spec) is module
    run, state = functional(module)
    state, dense_graph = dict(nnx.to_flat_state(state)), nnx.graphdef(make())

    def dense_run(leaves):
        return nnx.merge(dense_graph, nnx.from_flat_state({k: nnx.Param(v) for k, v in leaves.items()}))(x)

    jitted = nnx.jit(lambda m, x: m(x))
    values = {path: variable.get_value() for path, variable in state.items()}
    assert_close(lambda _: jitted(module, x), dense_run, values, longest)
    jaxpr = jax.make_jaxpr(run)(nnx.state(module), x)
    dots = count(jax.make_jaxpr(reference)(nnx.state(make()), x))
    assert count(jaxpr)["quantized_matmul"] == products
    dense_products = dots["dot_general"] + dots["conv_general_dilated"] - products
    assert count(jaxpr)["dot_general"] == dense_products and not count(jaxpr)["conv_general_dilated"]
    # What is dequantized: the rows that the embedding looks up.
    assert dense_sizes(jaxpr) == ({10 * 64} if name == "language" else set())


def test_modules_stay_what_they_are():
    module, report = Language(rngs()), jaxq.Report()
    jaxq_flax.quantize(module, INT4, report=report)
    assert isinstance(module.block.up, nnx.Linear) and isinstance(module.embed, nnx.Embed)
    assert {row.path for row in report.quantized} == {
        "embed/embedding",
        "block/up/kernel",
        "block/down/kernel",
        *(f"block/attention/{name}/kernel" for name in ("query", "key", "value", "out")),
    }
    assert {row.path: row.axis for row in report.quantized}["block/attention/out/kernel"] == (-3, -2)
    assert all(row.note for row in report.skipped)
    assert len(report.rows) == len(jax.tree.leaves(nnx.state(Language(rngs()))))


def test_what_no_layer_multiplies_by_is_left():
    class Own(nnx.Module):
        def __init__(self):
            self.table = nnx.Param(inputs(64, 64))
            self.conv = nnx.Conv(64, 64, (3, 3), rngs=rngs())
            self.padded = nnx.Conv(64, 64, (1,), padding=((1, 2),), rngs=rngs())
            self.free = nnx.Einsum("bd,de->be", (64, 64), rngs=rngs())
            self.embed = nnx.Embed(64, 64, rngs=rngs())
            self.same = self.embed.embedding

    module, report = Own(), jaxq.Report()
    # A rule with an axis, which overrides names, can't ask for what could not run.
    jaxq_flax.quantize(module, [("", INT4, -2)], report=report, donate=True)
    notes = {row.path: row.note for row in report.skipped}
    assert "no weight of" in notes["table"] and "window of (3, 3)" in notes["conv/kernel"]
    assert "padding" in notes["padded/kernel"]
    assert "shared" in notes["embed/embedding"]
    assert [row.path for row in report.quantized] == ["free/kernel"]
    assert module.same is module.embed.embedding and not module.same.get_value().is_deleted()


def test_shared_variables_stay_shared():
    class Tied(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(64, 64, rngs=rngs())
            self.second = nnx.Linear(64, 64, rngs=rngs())
            self.second.kernel = self.first.kernel

        def __call__(self, x):
            return self.second(self.first(x))

    module = jaxq_flax.quantize(Tied(), INT4)
    assert module.first.kernel is module.second.kernel
    assert isinstance(module.first.kernel, jaxq_flax.QuantizedParam)
    assert sum(map(jaxq.is_quantized, jax.tree.leaves(nnx.state(module), is_leaf=jaxq.is_quantized))) == 1
    w = module.first.kernel.get_value().dequantize()
    # Two products of length 64; entries of x below 4, of x @ w below 8, of w below 1.
    np.testing.assert_allclose(module(inputs(2, 64)), inputs(2, 64) @ w @ w, atol=2 * 64 * 64 * 8 * 2**-24)


def test_rules_per_path():
    module = Language(rngs())
    jaxq_flax.quantize(module, [("embed", jaxq.QuantSpec(8, 64)), ("attention", None), ("kernel", INT4)])
    assert module.embed.embedding.get_value().bits == 8 and module.block.up.kernel.get_value().bits == 4
    assert isinstance(module.block.attention.query.kernel, nnx.Param)
    with pytest.raises(TypeError, match=r"integrations\.flax\.quantize"):
        jaxq_flax.quantize(module, "int4")
    with pytest.raises(TypeError, match=r"pass an nnx\.Module"):
        jaxq_flax.quantize({"kernel": inputs(64, 64)}, INT4)


def test_graph_definitions_pickle():
    module = jaxq_flax.quantize(nnx.LoRALinear(64, 64, lora_rank=4, rngs=rngs()), INT4)
    graph, state = nnx.split(module)
    assert type(nnx.merge(pickle.loads(pickle.dumps(graph)), state)) is type(module)


def test_twice_is_once():
    module = jaxq_flax.quantize(nnx.Linear(64, 64, rngs=rngs()), INT4)
    kernel, kind = module.kernel, type(module)
    jaxq_flax.quantize(module, jaxq.QuantSpec(8, 32))
    assert module.kernel is kernel and type(module) is kind


def test_nan_is_refused_by_path():
    module = Language(rngs())
    kernel = module.block.up.kernel
    kernel.set_value(kernel.get_value().at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="block/up/kernel holds a NaN"):
        jaxq_flax.quantize(module, INT4)


# ---- layers in stacks


class Step(nnx.Module):
    def __init__(self, key):
        self.linear = nnx.Linear(64, 64, rngs=nnx.Rngs(key))

    def __call__(self, x):
        return jnp.tanh(self.linear(x))


def stacked() -> nnx.Module:
    return nnx.vmap(Step, in_axes=0, out_axes=0)(jax.random.split(jax.random.key(0), 3))


def scanned(module, x):
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(step, x):
        return step(x)

    return forward(module, x)


def test_scanned_layers():
    module = jaxq_flax.quantize(stacked(), INT4)
    weight = module.linear.kernel.get_value()
    assert weight.shape == (3, 64, 64) and weight.axis == (-2,)
    graph, _ = nnx.split(stacked())
    x = inputs(2, 64)

    def dense_run(tree):
        w, bias = tree
        y = x
        for i in range(3):
            y = jnp.tanh(y @ w[i] + bias[i])
        return y

    assert_close(lambda _: nnx.jit(scanned)(module, x), dense_run, (weight, module.linear.bias.get_value()), 64)
    graph, state = nnx.split(module)
    jaxpr = jax.make_jaxpr(lambda s, x: scanned(nnx.merge(graph, s), x))(state, x)
    assert count(jaxpr)["quantized_matmul"] == 1 and not dense_sizes(jaxpr) and not count(jaxpr)["dot_general"]


def test_vmapped_layers():
    module = jaxq_flax.quantize(stacked(), INT4)
    x = inputs(3, 5, 64)
    y = nnx.jit(nnx.vmap(lambda m, x: m(x)))(module, x)
    w, bias = module.linear.kernel.get_value().dequantize(), module.linear.bias.get_value()
    # One product of length 64, entries of x below 4 and of w below 1; tanh and the sum are a few roundings more.
    np.testing.assert_allclose(y, jnp.tanh(x @ w + bias[:, None]), atol=(64 + 8) * 64 * 4 * 2**-24)


# ---- training beside frozen weights


def test_gradients_leave_quantized_weights_frozen():
    module = jaxq_flax.quantize(nnx.LoRALinear(64, 48, lora_rank=4, rngs=rngs()), INT4)
    module.lora.lora_b.set_value(inputs(4, 48))
    x = inputs(5, 64)
    grads = nnx.jit(nnx.grad(lambda m: (m(x) ** 2).sum()))(module)
    assert set(nnx.to_flat_state(grads).paths) == {("bias",), ("lora", "lora_a"), ("lora", "lora_b")}
    w = module.kernel.get_value().dequantize()

    def loss(bias, a, b):
        return ((x @ w + bias + x @ a @ b) ** 2).sum()

    expected = jax.grad(loss, (0, 1, 2))(
        module.bias.get_value(), module.lora.lora_a.get_value(), module.lora.lora_b.get_value()
    )
    for name, value in zip(("bias", "lora_a", "lora_b"), expected, strict=True):
        found = (grads if name == "bias" else grads["lora"])[name].get_value()
        # Sums of at most 64 * 5 terms of 2 y times an entry below 4, with |y| below 64: three products in a row.
        np.testing.assert_allclose(found, value, atol=3 * 320 * 320 * 2 * 64 * 4 * 2**-24, rtol=320 * 2**-23)


def test_optimizer_updates_adapters_alone():
    module = jaxq_flax.quantize(nnx.LoRALinear(64, 48, lora_rank=4, rngs=rngs()), INT4)
    before = jax.tree.map(np.asarray, nnx.state(module, jaxq_flax.QuantizedParam))
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.LoRAParam)
    x = inputs(5, 64)

    @nnx.jit
    def step(module, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(module)
        optimizer.update(module, grads)
        return loss

    losses = [float(step(module, optimizer)) for _ in range(2)]
    assert losses[1] != losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(module, jaxq_flax.QuantizedParam))


# ---- saving


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_orbax(tmp_path, spec):
    module = jaxq_flax.quantize(Language(rngs()), spec)
    expected = nnx.jit(lambda m: m(IDS))(module)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(module))
        checkpointer.wait_until_finished()
        skeleton = nnx.eval_shape(lambda: jaxq_flax.quantize(Language(nnx.Rngs(1)), spec))
        graph, abstract = nnx.split(skeleton)
        state = checkpointer.restore(tmp_path / "state", abstract)
    restored = nnx.merge(graph, state)
    np.testing.assert_array_equal(nnx.jit(lambda m: m(IDS))(restored), expected)
