"""`jaxq.resident`: weights that MLX holds, in every transformation, and the lifetime of what it holds."""

from __future__ import annotations

import copy
import gc
import pickle

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxq
import jaxq.checkpoints.mlx
from jaxq.lowerings import mlx

mx = pytest.importorskip("mlx.core", reason=f"{mlx.unavailable()}")

SPEC = jaxq.QuantSpec(4, 64)
GONE = "jaxq.resident: the data of this weight is gone"


def held_bytes() -> int:
    gc.collect()
    return mx.get_active_memory()


def close_to_oracle(y, x, weight: cases.Weight, *, transpose: bool = True) -> None:
    error = np.abs(np.asarray(y, np.float64) - oracle.matmul(np.asarray(x), weight.dense, transpose=transpose))
    assert np.all(error <= cases.matmul_bound(x, weight.qw, weight.dense, transpose=transpose))


@pytest.mark.parametrize("spec", [s for s in cases.SPECS if mlx.refuses("", spec=s) is None], ids=str)
def test_product_and_dequantize(spec):
    weight = cases.weight(spec, (24, 256), "bfloat16")
    with jaxq.resident(weight.qw) as held:
        for dtype in cases.DTYPES:
            x = cases.activations((3, 256), dtype)
            y = jax.jit(lambda x, w: x @ w.T)(x, held)
            assert y.dtype == x.dtype
            close_to_oracle(y, x, weight)
        x = cases.activations((3, 24))
        close_to_oracle(x @ held, x, weight, transpose=False)
        dense = held.dequantize()
        assert dense.dtype == jnp.bfloat16
        error = np.abs(np.asarray(dense, np.float64) - weight.dense)
        assert np.all(error <= cases.dequantize_bound(weight.qw, weight.dense, "bfloat16"))


def test_it_looks_like_the_weight_it_stands_for():
    qw = cases.weight(SPEC, (2, 24, 128), "float16").qw
    tree = {"a": qw, "b": qw.mT, "c": jnp.ones(3)}
    with jaxq.resident(tree) as held:
        assert jax.tree.leaves(held)[-1] is tree["c"]
        for name in ("a", "b"):
            a, b = tree[name], held[name]
            assert isinstance(b, jaxq.QuantizedArray) and jaxq.is_quantized(b)
            for what in ("shape", "dtype", "ndim", "size", "bits", "group_size", "mode", "axis", "float_dtype"):
                assert getattr(a, what) == getattr(b, what), what
            assert b.nbytes == 2 * 4  # a number for each matrix
            assert "data in mlx" in repr(b)
            assert jax.eval_shape(jaxq.dequantize, b).shape == a.shape
        assert "int4g64@mlx" in str(jax.make_jaxpr(jaxq.dequantize)(held["a"]))
        assert held["a"][1].shape == (24, 128) and held["a"].mT.shape == (2, 128, 24)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tree: pickle.loads(pickle.dumps(tree))])
def test_a_copy_stands_for_the_same_data(duplicate):
    weight = cases.weight(SPEC, (24, 128))
    x = cases.activations((3, 128))
    with jaxq.resident(weight.qw) as held:
        close_to_oracle(x @ duplicate(held).T, x, weight)


# ---- transformations


def test_vmap_over_weights_and_over_both():
    weight = cases.weight(SPEC, (3, 24, 128))
    x = cases.activations((3, 5, 128))
    with jaxq.resident(weight.qw) as held:
        close_to_oracle(jax.vmap(lambda w: x[0] @ w.T)(held), x[0], weight)
        close_to_oracle(jax.jit(jax.vmap(lambda x, w: x @ w.T))(x, held), x, weight)
        close_to_oracle(jax.vmap(lambda x: x @ held[0].T)(x), x, cases.Weight(weight.qw[0], weight.dense[0]))


def test_scan_over_layers():
    weight = cases.weight(SPEC, (6, 64, 64))
    x = cases.activations((2, 64))

    def model(layers, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.T), x), x, layers)

    with jaxq.resident(weight.qw) as held:
        last, inputs = jax.jit(model)(held, x)
        for layer, before in enumerate(inputs):
            after = inputs[layer + 1] if layer < 5 else last
            one = cases.Weight(weight.qw[layer], weight.dense[layer])
            y = oracle.matmul(np.asarray(before), one.dense, transpose=True)
            # tanh does not enlarge the product's error and adds its own, of a few units in the last place of 1.
            bound = cases.matmul_bound(before, one.qw, one.dense, transpose=True) + 4 * 2.0**-24
            assert np.all(np.abs(np.asarray(after, np.float64) - np.tanh(y)) <= bound)


def test_derivative_with_respect_to_x():
    weight = cases.weight(SPEC, (24, 128))
    x = cases.activations((3, 128))
    cotangent = cases.activations((3, 24), seed=2)
    with jaxq.resident(weight.qw) as held:
        y, pullback = jax.vjp(lambda x: x @ held.T, x)
        close_to_oracle(y, x, weight)
        close_to_oracle(pullback(cotangent)[0], cotangent, weight, transpose=False)


def test_one_program_serves_every_weight_of_a_shape():
    weights = [cases.weight(SPEC, (24, 128), seed=seed) for seed in (0, 1)]
    x = cases.activations((3, 128))
    traces = []

    @jax.jit
    def f(x, w):
        traces.append(w)
        return x @ w.T

    with jaxq.resident([w.qw for w in weights]) as held:
        for weight, own in zip(weights, held, strict=True):
            close_to_oracle(f(x, own), x, weight)
    assert len(traces) == 1


def test_calls_copy_no_weights():
    # 8 MiB of codes; a call that copied them would leave its mark in MLX's peak.
    scales = jnp.ones((2048, 32))
    packed = jnp.zeros((2048, 1024), jnp.uint32)
    qw = jaxq.QuantizedArray.from_packed(packed, scales, scales, bits=8, group_size=128)
    x = jnp.ones((1, 4096))
    with jaxq.resident(qw) as held:
        f = jax.jit(lambda x, w: x @ w.T)
        jax.block_until_ready(f(x, held))
        mx.reset_peak_memory()
        before = held_bytes()
        jax.block_until_ready(f(x, held))
        assert mx.get_peak_memory() - before < packed.nbytes // 8


# ---- lifetime


def test_close_frees_the_memory():
    qw = cases.weight(SPEC, (512, 1024), "bfloat16").qw
    before = held_bytes()
    residency = jaxq.resident({"w": qw})
    # packed, and scales and biases in float32.
    expected = 512 * 1024 // 2 + 2 * 4 * 512 * 16
    assert residency.nbytes == expected
    # MLX's allocator rounds up to whole pages; 16 KiB is the largest page there is.
    assert expected <= held_bytes() - before <= expected + 3 * 2**14
    assert not residency.closed
    residency.close()
    residency.close()
    assert residency.closed and "closed" in repr(residency)
    assert held_bytes() == before


def test_collection_frees_the_memory_and_the_tree_alone_does_not_prevent_it():
    qw = cases.weight(SPEC, (512, 1024)).qw
    x = jnp.ones((1, 1024))
    before = held_bytes()
    residency = jaxq.resident(qw)
    tree = residency.tree
    f = jax.jit(lambda x, w: x @ w.T)
    f(x, tree).block_until_ready()
    assert held_bytes() > before
    del residency
    assert held_bytes() == before  # nor does the program that was compiled for it
    with pytest.raises(Exception, match=GONE):
        f(x, tree).block_until_ready()


def test_after_close_every_use_says_so():
    weight = cases.weight(SPEC, (2, 24, 128))
    x = cases.activations((3, 128))
    f = jax.jit(lambda x, w: x @ w.T)
    with jaxq.resident(weight.qw) as held, jaxq.resident(weight.qw) as other:
        f(x, held[0]).block_until_ready()
    residency = jaxq.resident(weight.qw)
    residency.close()
    for use in (
        lambda: f(x, held[0]),
        lambda: x @ other[1].T,
        lambda: held.dequantize(),
        lambda: jax.vmap(lambda w: x @ w.T)(held),
    ):
        with pytest.raises(Exception, match=GONE):
            jax.block_until_ready(use())
    with pytest.raises(ValueError, match="this residency is closed"), residency:
        pass


def test_a_block_that_fails_gives_the_memory_back():
    qw = cases.weight(SPEC, (512, 1024)).qw
    before = held_bytes()
    with pytest.raises(ZeroDivisionError), jaxq.resident(qw):
        raise ZeroDivisionError
    assert held_bytes() == before


def test_a_tree_that_can_not_be_loaded_leaves_nothing_behind(monkeypatch):
    qw = cases.weight(SPEC, (512, 1024)).qw
    load, calls = mlx.load, []

    def fail_at_the_second(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return load(*args, **kwargs)

    before = held_bytes()
    monkeypatch.setattr(mlx, "load", fail_at_the_second)
    with pytest.raises(MemoryError):
        jaxq.resident([qw, qw])
    calls.clear()
    assert held_bytes() == before


# ---- what is refused


def test_refusals():
    qw = cases.weight(SPEC, (24, 128)).qw
    x = cases.activations((3, 128))
    with pytest.raises(ValueError, match="resident: the tree holds no QuantizedArray"):
        jaxq.resident({"a": x})
    with pytest.raises(ValueError, match=r"resident: \['a'\]\[1\] is int6g16: MLX has affine groups of 32, 64 and 128"):
        jaxq.resident({"a": [qw, cases.weight(jaxq.QuantSpec(6, 16), (24, 128)).qw]})
    with pytest.raises(TypeError, match="resident: the weight is traced"):
        jax.jit(lambda qw: jaxq.resident(qw).tree)(qw)
    with jaxq.resident(qw) as held:
        with pytest.raises(ValueError, match="resident: the weight is resident already"):
            jaxq.resident(held)
        for name in ("xla", *(["cpu"] if "cpu" in cases.IMPLEMENTATIONS else [])):
            with pytest.raises(ValueError, match="the weight's data is held by mlx, outside JAX"):
                jaxq.quantized_matmul(x, held, implementation=name)
        with pytest.raises(ValueError, match="dequantize: no implementation can run int4g64@mlx on tpu"):
            jax.jit(jaxq.dequantize).trace(held).lower(lowering_platforms=("tpu",))
        with pytest.raises(ValueError, match="quantized_matmul: no implementation can run int4g64@mlx on cpu"):
            jax.export.export(jax.jit(jaxq.quantized_matmul))(x, held)
        with pytest.raises(IndexError, match="rows of a weight that is held by mlx can't be indexed"):
            held[3]


def test_saving_is_refused_since_only_numbers_would_be_saved(tmp_path):
    with jaxq.resident({"w.weight": cases.weight(SPEC, (24, 128)).qw}) as held:
        with pytest.raises(TypeError, match=r"save: the data of .* is held by mlx; save the tree"):
            jaxq.save(tmp_path / "tree.safetensors", held)
        with pytest.raises(TypeError, match=r"mlx\.save: the data of 'w\.weight' is held by mlx"):
            jaxq.checkpoints.mlx.save(tmp_path / "model", held)
    assert list(tmp_path.iterdir()) == []


def test_without_mlx(monkeypatch):
    monkeypatch.setattr(mlx, "unavailable", lambda: "mlx is missing")
    with pytest.raises(ValueError, match="resident: mlx is missing"):
        jaxq.resident(cases.weight(SPEC, (24, 128)).qw)
