"""Which formats are legal, and what follows from one."""

import ml_dtypes
import numpy as np
import pytest
from cases import SPECS

import jaxq


def test_defaults():
    assert jaxq.QuantSpec() == jaxq.QuantSpec(4, 64, "affine")
    assert jaxq.QuantSpec(mode="mxfp4") == jaxq.QuantSpec(4, 32, "mxfp4")
    assert jaxq.QuantSpec(mode="mxfp8") == jaxq.QuantSpec(8, 32, "mxfp8")
    assert jaxq.QuantSpec(mode="nvfp4") == jaxq.QuantSpec(4, 16, "nvfp4")


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (jaxq.QuantSpec(2), ml_dtypes.int2),
        (jaxq.QuantSpec(3), ml_dtypes.int4),
        (jaxq.QuantSpec(4), ml_dtypes.int4),
        (jaxq.QuantSpec(5), np.int8),
        (jaxq.QuantSpec(6), np.int8),
        (jaxq.QuantSpec(8), np.int8),
        (jaxq.QuantSpec(mode="mxfp4"), ml_dtypes.float4_e2m1fn),
        (jaxq.QuantSpec(mode="mxfp8"), ml_dtypes.float8_e4m3fn),
        (jaxq.QuantSpec(mode="nvfp4"), ml_dtypes.float4_e2m1fn),
    ],
    ids=str,
)
def test_dtype(spec, dtype):
    assert spec.dtype == np.dtype(dtype)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_words_and_length_agree(spec):
    for multiple in range(1, 9):
        length = multiple * spec.length_multiple
        assert spec.words(length) * 32 == length * spec.bits
        assert spec.length(spec.words(length)) == length
        assert spec.groups(length) * spec.group_size == length


def test_hashable_and_frozen():
    assert len({jaxq.QuantSpec(), jaxq.QuantSpec(4), jaxq.QuantSpec(8)}) == 2
    with pytest.raises(AttributeError):
        jaxq.QuantSpec().bits = 8


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(bits=7), ValueError, r"bits=7 is not legal in mode 'affine'; pick one of 2, 3, 4, 5, 6, 8"),
        (dict(group_size=48), ValueError, r"group_size=48 is not legal .* 16, 32, 64, 128"),
        (dict(mode="mxfp4", group_size=64), ValueError, r"group_size=64 is not legal in mode 'mxfp4'; pick one of 32"),
        (dict(mode="fp4"), ValueError, r"mode='fp4' is unknown; pick one of affine, mxfp4, mxfp8, nvfp4"),
        (dict(bits=4.0), TypeError, r"bits=4.0 is a float; pass an int"),
        (dict(bits=True), TypeError, r"bits=True is a bool"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match="QuantSpec: " + message):
        jaxq.QuantSpec(**arguments)
