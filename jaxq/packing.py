"""Codes <-> uint32 words, laid out as MLX lays them out: a little-endian bit stream along the last axis.

Code i occupies bits [i*bits, (i+1)*bits) of the stream; bit b of the stream is bit b % 32 of word b // 32.

    4 bits, one word:      31  28 27  24 23  20 19  16 15  12 11   8 7    4 3    0
                          [ c7   | c6   | c5   | c4   | c3   | c2   | c1   | c0   ]

    3 bits, three words hold 32 codes, and two codes straddle:
                  word 0: [c10 lo 2 bits | c9 | c8 | ... | c1 | c0]         c10 = bits 30..32
                  word 1: [c21 lo 1 bit  | c20 | ... | c11 | c10 hi 1 bit]  c21 = bits 63..65
                  word 2: [c31 | c30 | ... | c22 | c21 hi 2 bits]

    5 bits: 32 codes in five words.  6 bits: 16 codes in three words.  2 and 8 bits: like 4, 16 and 4 codes a word.

Source of the layout: `mlx.core.quantize` (bits 3, 5 and 6 as bytes, which in little-endian words is the same stream).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxq.spec import WORD_BITS


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Pack unsigned codes into words.

    Args:
      codes: any integer dtype [..., K], values in [0, 2**bits); K * bits is a multiple of 32.
      bits: 2, 3, 4, 5, 6 or 8.

    Returns:
      uint32[..., K * bits / 32].
    """
    codes = codes.astype(jnp.uint32)
    if WORD_BITS % bits:
        # A code may straddle two words, but a bit can't.
        codes, bits = _split(codes, bits, 1), 1
    return _join(codes, bits, WORD_BITS)


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack`.

    Args:
      packed: uint32[..., W]; W * 32 is a multiple of bits.
      bits: 2, 3, 4, 5, 6 or 8.

    Returns:
      uint32[..., W * 32 / bits], values in [0, 2**bits).
    """
    if WORD_BITS % bits:
        return _join(_split(packed, WORD_BITS, 1), 1, bits)
    return _split(packed, WORD_BITS, bits)


def _split(values: jax.Array, width: int, bits: int) -> jax.Array:
    """uint32[..., n] of `width` bits each -> [..., n * width / bits] of `bits` each, the lowest first."""
    *lead, size = values.shape
    pieces = (values[..., None] >> _shifts(width, bits)) & jnp.uint32(2**bits - 1)
    return pieces.reshape(*lead, size * (width // bits))


def _join(pieces: jax.Array, bits: int, width: int) -> jax.Array:
    """The inverse of `_split`."""
    *lead, size = pieces.shape
    count = width // bits
    groups = pieces.reshape(*lead, size // count, count)
    # The pieces occupy disjoint bits, so their sum is their or.
    return jnp.sum(groups << _shifts(width, bits), axis=-1, dtype=jnp.uint32)


def _shifts(width: int, bits: int) -> jax.Array:
    return jnp.arange(0, width, bits, dtype=jnp.uint32)
