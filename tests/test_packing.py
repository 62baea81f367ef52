"""Codes <-> words."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxq import packing

BITS = (2, 3, 4, 5, 6, 8)


@st.composite
def codes_and_bits(draw):
    bits = draw(st.sampled_from(BITS))
    rows, length = draw(st.integers(0, 1)), 32 * draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.integers(0, 2**bits, (rows, length)), bits


@given(codes_and_bits())
@settings(deadline=None, max_examples=40)
def test_round_trip(case):
    codes, bits = case
    packed = packing.pack(jnp.asarray(codes, jnp.uint32), bits)
    assert packed.shape == (codes.shape[0], codes.shape[1] * bits // 32)
    np.testing.assert_array_equal(packing.unpack(packed, bits), codes)


@given(codes_and_bits())
@settings(deadline=None, max_examples=40)
def test_layout(case):
    codes, bits = case
    if codes.shape[0]:
        np.testing.assert_array_equal(packing.pack(jnp.asarray(codes, jnp.uint32), bits), oracle.pack(codes, bits))


@pytest.mark.parametrize("bits", BITS)
def test_one_code(bits):
    """Code i alone fills bits [i * bits, (i + 1) * bits) of the stream, written out as an integer."""
    for i in range(32):
        codes = np.zeros((1, 32), np.uint32)
        codes[0, i] = 2**bits - 1
        words = np.asarray(packing.pack(jnp.asarray(codes), bits))[0]
        assert sum(int(word) << (32 * j) for j, word in enumerate(words)) == (2**bits - 1) << (i * bits)
