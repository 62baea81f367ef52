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

import math

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
    period, words = _period(bits)
    codes = codes.astype(jnp.uint32).reshape(*codes.shape[:-1], -1, period)
    packed = []
    for word in range(words):
        terms = []
        for i, first in _codes_of(word, bits):
            code = codes[..., i]
            terms.append(code << jnp.uint32(first) if first >= 0 else code >> jnp.uint32(-first))
        # The terms occupy disjoint bits, so the order of the ors is free; a tree keeps the graph shallow.
        while len(terms) > 1:
            terms = [terms[j] | terms[j + 1] for j in range(0, len(terms) - 1, 2)] + terms[len(terms) & ~1 :]
        packed.append(terms[0])
    return jnp.stack(packed, axis=-1).reshape(*codes.shape[:-2], -1)


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack`.

    Args:
      packed: uint32[..., W]; W * 32 is a multiple of bits.
      bits: 2, 3, 4, 5, 6 or 8.

    Returns:
      uint32[..., W * 32 / bits], values in [0, 2**bits).
    """
    period, words = _period(bits)
    mask = jnp.uint32(2**bits - 1)
    if words == 1:
        shifts = jnp.arange(period, dtype=jnp.uint32) * jnp.uint32(bits)
        codes = (packed[..., None] >> shifts) & mask
        return codes.reshape(*packed.shape[:-1], -1)
    packed = packed.reshape(*packed.shape[:-1], -1, words)
    codes = []
    for i in range(period):
        word, first = divmod(i * bits, WORD_BITS)
        code = packed[..., word] >> jnp.uint32(first)
        if first + bits > WORD_BITS:
            code = code | packed[..., word + 1] << jnp.uint32(WORD_BITS - first)
        codes.append(code & mask)
    return jnp.stack(codes, axis=-1).reshape(*packed.shape[:-2], -1)


def _period(bits: int) -> tuple[int, int]:
    """The shortest run of codes that fills whole words, and how many words that is."""
    common = math.lcm(bits, WORD_BITS)
    return common // bits, common // WORD_BITS


def _codes_of(word: int, bits: int) -> list[tuple[int, int]]:
    """(index of code, its first bit relative to the word; negative where it began in the word before)."""
    first, last = word * WORD_BITS // bits, ((word + 1) * WORD_BITS - 1) // bits
    return [(i, i * bits - word * WORD_BITS) for i in range(first, last + 1)]
