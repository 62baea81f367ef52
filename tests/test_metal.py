"""What jax-metal (platform METAL) gets: plain operations on whole-byte types, in every format."""

from __future__ import annotations

import pathlib
import re

import cases
import jax
import pytest

import jaxq

S = jax.ShapeDtypeStruct
# i1 is the type of a comparison and stays on the device; every other type below a byte, and every float of a byte or
# less, is unknown to StableHLO 1.7.5 and so to that plugin.
NARROW = re.compile(r"tensor<(?:[\dx]*x)?((?:u?i[2-7])|(?:f[4-8]E\w+))>")


def check(f, *args) -> None:
    text = jax.jit(f).trace(*args).lower(lowering_platforms=("METAL",)).as_text()
    assert "stablehlo" in text
    assert "custom_call" not in text
    assert NARROW.findall(text) == []


def test_the_pattern_finds_what_it_should():
    found = NARROW.findall("tensor<2x3xi4> tensor<ui2> tensor<4xf4E2M1FN> tensor<f8E4M3FN> tensor<2xi1> tensor<3xui32>")
    assert found == ["i4", "ui2", "f4E2M1FN", "f8E4M3FN"]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("spec", cases.SPECS, ids=str)
def test_plain_operations_only(spec, dtype):
    def quantize(w):
        return jaxq.quantize(w, bits=spec.bits, group_size=spec.group_size, mode=spec.mode)

    w = S((16, 256), dtype)
    qw = jax.eval_shape(quantize, w)
    check(quantize, w)
    check(jaxq.dequantize, qw)
    for transpose in (True, False):
        x = S((3, 256 if transpose else 16), dtype)

        def product(x, qw, transpose=transpose):
            return jaxq.quantized_matmul(x, qw, transpose=transpose)

        check(product, x, qw)
        check(jax.grad(lambda x, qw, f=product: f(x, qw).sum().astype("float32")), x, qw)


def test_it_serializes_to_the_version_that_the_plugin_reads(monkeypatch):
    # `make metal` also runs what this writes, on the jaxlib of that time.
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent.parent / "tools")
    import metal

    _, f, args, _, _ = metal.matmul_program(jaxq.QuantSpec(3, 32), "bfloat16", transpose=True)
    assert b"StableHLO_v1.7.5" in metal.serialize(f, args)[:64]
