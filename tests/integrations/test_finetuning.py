"""Training beside frozen quantized weights: gradients reach what is asked, and no weight is made dense to stay."""

from __future__ import annotations

import importlib.util
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from model_checks import count, equations

import jaxq
from jaxq.primitives import common

SPEC = jaxq.QuantSpec(4, 64)
WIDTHS = [64, 256, 256, 48]


@pytest.fixture(scope="module")
def qlora():
    """The example as a module, its network and its step."""
    path = pathlib.Path(__file__).parents[2] / "examples" / "qlora.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec = importlib.util.spec_from_file_location("qlora", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup(qlora):
    """Dense and quantized parameters, adapters that do something, a batch."""
    dense, adapters = qlora.init(WIDTHS)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda a: jnp.asarray(0.05 * rng.standard_normal(a.shape), jnp.float32), adapters)
    quantized = jaxq.quantize_tree(dense, SPEC)
    x = jnp.asarray(rng.uniform(0, 1, (32, 64)), jnp.float32)
    return quantized, jaxq.dequantize_tree(quantized), adapters, x, jnp.asarray(rng.integers(0, 48, 32))


def gradient(qlora, names, quantized, adapters):
    """The gradient of the loss for what `names` says, as a function, and where to take it."""
    trained = qlora.split(quantized, adapters, names)

    def loss(trained, x, labels):
        return jaxq.dispatch(qlora.loss)(*qlora.merge(quantized, adapters, trained), x, labels)

    return jax.grad(loss), trained


def test_gradients_agree_with_the_dense_network(qlora, setup):
    quantized, dense, adapters, x, labels = setup
    grad, trained = gradient(qlora, ["adapters", "scales", "biases"], quantized, adapters)
    found = jax.jit(grad)(trained, x, labels)
    by_weight, by_adapter = jax.jit(jax.grad(qlora.loss, (0, 1)))(dense, adapters, x, labels)

    def close(got, expected, terms):
        # Seven products in a row, three there and four back, of at most 256 terms each, and the sum of `terms` here;
        # errors relative to the largest entry, and a factor of 8 for what cancels.
        bound = 8 * (7 * 256 + terms) * 2**-24 * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(got), expected, atol=bound)

    jax.tree.map(lambda a, b: close(a, np.asarray(b), 32), found["adapters"], by_adapter)
    for layer, slopes, held in zip(quantized, by_weight, found["kernels"], strict=True):
        # w = scale * code + bias for each group along the inputs, so both sum over the group.
        codes = oracle.unpack(np.asarray(layer["kernel"].packed), 4).astype(np.float64)
        slope = np.asarray(slopes["kernel"], np.float64).T.reshape(*codes.shape[:-1], -1, 64)
        close(held["biases"], slope.sum(-1), 64)
        close(held["scales"], (slope * codes.reshape(slope.shape)).sum(-1), 64 * 15)


def test_adapters_need_no_dense_weight_in_the_jaxpr(qlora, setup):
    quantized, _, adapters, x, labels = setup
    grad, trained = gradient(qlora, ["adapters"], quantized, adapters)
    jaxpr = jax.make_jaxpr(grad)(trained, x, labels)
    # Three on the way there; on the way back the first layer's input needs no gradient.
    assert count(jaxpr)["quantized_matmul"] == 3 + 2
    assert not count(jaxpr)["dequantize"]
    shapes = {tuple(layer["kernel"].shape) for layer in quantized}
    shapes |= {shape[::-1] for shape in shapes}
    made = {v.aval.shape for eqn in equations(jaxpr) for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating)}
    assert not shapes & made


@pytest.mark.parametrize("names", [["adapters"], ["adapters", "scales", "biases"]], ids=["adapters", "everything"])
def test_memory_of_the_compiled_step(qlora, setup, names):
    """Beside its arguments the 4-bit step needs what the dense one does; no copy of a weight on top of that."""
    quantized, dense, adapters, x, labels = setup
    optimizer = optax.adam(1e-3)

    def temporaries(params):
        trained = qlora.split(params, adapters, names)
        arguments = (trained, optimizer.init(trained), (params, adapters), x, labels)
        return jax.jit(qlora.train_step(optimizer)).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    largest = 4 * max(w * n for w, n in itertools.pairwise(WIDTHS))
    extra = temporaries(quantized) - temporaries(dense)
    # Scales and biases need the slope of one weight at a time, which is as large as the weight and does not stay; and
    # so does a dense weight where only plain XLA runs the product.
    fused = common.IMPLEMENTATIONS["cpu"].unavailable() is None
    transient = (0 if names == ["adapters"] else 2) + (0 if fused else 2)
    padding = 64 * 1024
    assert extra <= transient * largest + padding
    # Persisting copies would be all three weights, and be there at once.
    assert transient > 0 or padding < largest
