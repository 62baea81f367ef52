"""The implementation `mps`: the very text that jax-mps 0.11.1 emits, and plain operations where it has none."""

from __future__ import annotations

import json
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxq
from jaxq.lowerings import mps

S = jax.ShapeDtypeStruct
SUPPORTED = [s for s in cases.SPECS if s.is_affine and s.bits in (4, 8) and s.group_size != 16]
OTHERS = [s for s in cases.SPECS if s not in SUPPORTED]

# What jax-mps 0.11.1 (on jax 0.11.2) emits for w[128, 256] and x[2, 256] in bfloat16, bits 4 and 8, groups of 64.
# {bits} and {words} are filled in; nothing else differs between the two.
CONTRACT = {
    "quantize": (
        "stablehlo.custom_call @mps.quantize(%arg0) "
        '{{api_version = 2 : i32, backend_config = "{{\\22group_size\\22: 64, \\22bits\\22: {bits}}}"}} : '
        "(tensor<128x256xbf16>) -> (tensor<128x{words}xui32>, tensor<128x4xbf16>, tensor<128x4xbf16>)"
    ),
    "dequantize": (
        "stablehlo.custom_call @mps.dequantize(%arg0, %arg1, %arg2) "
        '{{api_version = 2 : i32, backend_config = "{{\\22group_size\\22: 64, \\22bits\\22: {bits}}}"}} : '
        "(tensor<128x{words}xui32>, tensor<128x4xbf16>, tensor<128x4xbf16>) -> tensor<128x256xbf16>"
    ),
    "quantized_matmul": (
        "stablehlo.custom_call @mps.quantized_matmul(%arg0, %arg1, %arg2, %arg3) "
        '{{api_version = 2 : i32, backend_config = "{{\\22transpose\\22: 1, \\22group_size\\22: 64, \\22bits\\22: '
        '{bits}}}"}} : (tensor<2x256xbf16>, tensor<128x{words}xui32>, tensor<128x4xbf16>, tensor<128x4xbf16>) '
        "-> tensor<2x128xbf16>"
    ),
    "quantized_matmul, not transposed": (
        "stablehlo.custom_call @mps.quantized_matmul(%arg0, %arg1, %arg2, %arg3) "
        '{{api_version = 2 : i32, backend_config = "{{\\22transpose\\22: 0, \\22group_size\\22: 64, \\22bits\\22: '
        '{bits}}}"}} : (tensor<2x128xbf16>, tensor<128x{words}xui32>, tensor<128x4xbf16>, tensor<128x4xbf16>) '
        "-> tensor<2x256xbf16>"
    ),
}


def lower(f, *args, platforms=("mps",)) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=platforms).as_text()


def calls(text: str) -> list[str]:
    return [line.strip().partition(" = ")[2] for line in text.splitlines() if "custom_call" in line]


def abstract(spec: jaxq.QuantSpec, shape: tuple[int, ...], dtype="bfloat16") -> jaxq.QuantizedArray:
    def quantize(w):
        return jaxq.quantize(w, bits=spec.bits, group_size=spec.group_size, mode=spec.mode)

    return jax.eval_shape(quantize, S(shape, dtype))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("op", CONTRACT)
def test_the_text_is_that_of_jax_mps(op, bits):
    qw = abstract(jaxq.QuantSpec(bits, 64), (128, 256))
    f, args = {
        "quantize": (lambda w: jaxq.quantize(w, bits=bits, group_size=64), (S((128, 256), "bfloat16"),)),
        "dequantize": (jaxq.dequantize, (qw,)),
        "quantized_matmul": (jaxq.quantized_matmul, (S((2, 256), "bfloat16"), qw)),
        "quantized_matmul, not transposed": (
            lambda x, w: jaxq.quantized_matmul(x, w, transpose=False),
            (S((2, 128), "bfloat16"), qw),
        ),
    }[op]
    assert calls(lower(f, *args)) == [CONTRACT[op].format(bits=bits, words=256 * bits // 32)]


@pytest.mark.parametrize("spec", cases.SPECS, ids=str)
def test_other_formats_get_plain_operations(spec):
    qw = abstract(spec, (64, 256))
    texts = [
        lower(
            lambda w: jaxq.quantize(w, bits=spec.bits, group_size=spec.group_size, mode=spec.mode),
            S((64, 256), "float32"),
        ),
        lower(jaxq.dequantize, qw),
        lower(jaxq.quantized_matmul, S((2, 256), "bfloat16"), qw),
    ]
    for text in texts:
        assert len(calls(text)) == (1 if spec in SUPPORTED else 0)


@pytest.mark.parametrize("platforms", [("cpu", "mps"), ("mps", "METAL"), ("mps", "cuda", "tpu")], ids=str)
def test_modules_for_several_platforms_get_plain_operations(platforms):
    qw = abstract(jaxq.QuantSpec(4, 64), (64, 256))
    text = lower(jaxq.quantized_matmul, S((2, 256), "float32"), qw, platforms=platforms)
    assert "custom_call" not in text and "dot_general" in text


@pytest.mark.parametrize("spec", OTHERS, ids=str)
def test_a_name_never_falls_back(spec):
    with pytest.raises(ValueError, match=f"implementation='mps' can't be used here: jax-mps has affine .* not {spec}"):
        jax.eval_shape(
            lambda x, w: jaxq.quantized_matmul(x, w, implementation="mps"),
            S((2, 256), "float32"),
            abstract(spec, (64, 256)),
        )


def test_a_name_is_refused_for_several_platforms():
    qw = abstract(jaxq.QuantSpec(4, 64), (64, 256))

    def f(x, w):
        return jaxq.quantized_matmul(x, w, implementation="mps")

    with pytest.raises(ValueError, match="serves mps, and this is lowered for several platforms"):
        lower(f, S((2, 256), "float32"), qw, platforms=("mps", "METAL"))


# ---- what stands around the calls, with the oracle in their place


@pytest.fixture
def oracle_calls(monkeypatch):
    """mps.* computed by the oracle, which takes what the plugin's kernels take and nothing else. Lists the targets."""
    seen = []

    def bind(*operands, target, config, results):
        op = target.removeprefix("mps.")
        attributes = json.loads(config)
        transpose = attributes.pop("transpose", None)
        assert all(a.ndim == 2 for a in operands) and operands[-1].dtype == results[-1].dtype
        seen.append(op)
        if op == "quantize":
            leaves = jaxq.quantize(*operands, **attributes, implementation="xla").leaves
            return list(leaves)
        *x, packed, scales, biases = operands
        assert scales.dtype == biases.dtype and all(a.dtype == scales.dtype for a in x)
        y = oracle.dequantize(*map(np.asarray, (packed, scales, biases)), **attributes, mode="affine")
        if op == "quantized_matmul":
            y = oracle.matmul(np.asarray(x[0]), y, transpose=bool(transpose))
        assert y.shape == results[0].shape
        return [jnp.asarray(y.astype(np.float32)).astype(results[0].dtype)]

    monkeypatch.setattr(mps._call_p, "bind", bind)
    return seen


def on_mps(op, *args, **parameters):
    """An operation of the module as the lowering rule calls it, eagerly."""
    return getattr(mps, op)(*args, **parameters)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("scale_dtype", cases.DTYPES)
@pytest.mark.parametrize("x_dtype", cases.DTYPES)
def test_product_of_any_dtypes(oracle_calls, x_dtype, scale_dtype, transpose):
    weight = cases.weight(jaxq.QuantSpec(4, 64), (24, 128), scale_dtype)
    x = cases.activations((5, 128 if transpose else 24), x_dtype)
    y = on_mps("quantized_matmul", x, *weight.qw.leaves, spec=weight.qw.spec, transpose=transpose)
    assert y.dtype == x.dtype and oracle_calls == ["quantized_matmul"]
    error = np.abs(np.asarray(y, np.float64) - oracle.matmul(np.asarray(x), weight.dense, transpose=transpose))
    assert np.all(error <= cases.matmul_bound(x, weight.qw, weight.dense, transpose=transpose))


@pytest.mark.parametrize("spec", SUPPORTED, ids=str)
def test_a_batch_of_weights_is_a_call_for_each(oracle_calls, spec):
    weight = cases.weight(spec, (3, 24, 128))
    x = cases.activations((3, 5, 128))
    y = on_mps("quantized_matmul", x, *weight.qw.leaves, spec=spec, transpose=True)
    assert oracle_calls == ["quantized_matmul"] * 3
    error = np.abs(np.asarray(y, np.float64) - oracle.matmul(np.asarray(x), weight.dense, transpose=True))
    assert np.all(error <= cases.matmul_bound(x, weight.qw, weight.dense, transpose=True))


@pytest.mark.parametrize("scale_dtype", cases.DTYPES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_dequantize_stacks_to_any_dtype(oracle_calls, dtype, scale_dtype):
    weight = cases.weight(jaxq.QuantSpec(8, 32), (2, 3, 24, 128), scale_dtype)
    w = on_mps("dequantize", *weight.qw.leaves, spec=weight.qw.spec, dtype=jnp.dtype(dtype))
    assert w.dtype == jnp.dtype(dtype) and oracle_calls == ["dequantize"]
    error = np.abs(np.asarray(w, np.float64) - weight.dense)
    assert np.all(error <= cases.dequantize_bound(weight.qw, weight.dense, dtype))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_quantize_poisons_what_the_kernels_would_not(oracle_calls, monkeypatch, dtype, bad):
    spec = jaxq.QuantSpec(4, 64)
    w = np.array(cases.activations((2, 3, 128), dtype))
    clean = on_mps("quantize", jnp.asarray(w), spec=spec)
    # The kernels get clean numbers, as if they let the bad one pass.
    inner = mps._call_p.bind
    monkeypatch.setattr(mps._call_p, "bind", lambda rows, **k: inner(jnp.where(jnp.isfinite(rows), rows, 0), **k))
    w[1, 2, 70] = bad
    packed, *params = on_mps("quantize", jnp.asarray(w), spec=spec)
    assert packed.shape == clean[0].shape
    poisoned = np.zeros((2, 3, 2), bool)
    poisoned[1, 2, 1] = True
    for param, before in zip(params, clean[1:], strict=True):
        assert param.dtype == before.dtype
        np.testing.assert_array_equal(np.isnan(param), poisoned)
        np.testing.assert_array_equal(np.asarray(param)[~poisoned], np.asarray(before)[~poisoned])


def test_nothing_to_do_is_no_call(oracle_calls):
    qw = cases.weight(jaxq.QuantSpec(4, 64), (24, 128)).qw
    assert on_mps("quantized_matmul", jnp.zeros((0, 128)), *qw.leaves, spec=qw.spec, transpose=True).shape == (0, 24)
    assert [a.shape for a in on_mps("quantize", jnp.zeros((2, 0, 64)), spec=qw.spec)] == [
        (2, 0, 8),
        (2, 0, 1),
        (2, 0, 1),
    ]
    assert oracle_calls == []


# ---- transformations


def test_transformations_keep_the_calls():
    qw = abstract(jaxq.QuantSpec(4, 64), (64, 256), "float32")
    x = S((5, 2, 256), "float32")
    rows = calls(lower(jax.vmap(jaxq.quantized_matmul, in_axes=(0, None)), x, qw))
    assert len(rows) == 1 and "tensor<10x256xf32>" in rows[0]  # a batch of x is more rows
    backward = calls(lower(jax.grad(lambda x, w: (jaxq.quantized_matmul(x, w) ** 2).sum()), S((2, 256), "float32"), qw))
    assert [re.search(r"transpose\\22: (\d)", call)[1] for call in backward] == ["1", "0"]


def test_the_platform_is_listed():
    row = jaxq.implementations()["mps"]
    assert row["mps"] == "default" and row["xla"] == "usable"
