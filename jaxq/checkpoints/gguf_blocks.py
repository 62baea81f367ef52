"""GGUF's blocks as groups: for each type, its codes and the scale and bias that make it `scales * code + biases`.

The map is exact: in float32 the products have at most 24 bits, so `scales * code + biases` rounds only where the
reference does. Layouts: ggml's `ggml-common.h` and `dequantize_row_*` of `ggml-quants.c`
(https://github.com/ggml-org/ggml). An fp16 times a 6-bit scale has 17 bits, times an 8-bit one 18, so only those
whose scale is the fp16 itself keep it in float16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxq.checkpoints.codes import pack
from jaxq.spec import QuantSpec

# uint8[n, bytes of a block] -> codes uint8[n, block], or packed in uint32; scales [n, groups of a block]; and, in mode
# affine, biases like them
Unpack = Callable[[np.ndarray], tuple[np.ndarray, ...]]


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A type of GGUF's that is a group format.

    Attributes:
      block: weights in a block.
      nbytes: bytes of a block.
      spec: the format that holds it.
      scale_dtype: the narrowest dtype that holds scales and biases exactly.
      unpack: a block's codes, scales and biases; float32, or uint8 scales in a float mode.
    """

    block: int
    nbytes: int
    spec: QuantSpec
    scale_dtype: Any
    unpack: Unpack

    def repack(self, blocks: np.ndarray, leaves: Sequence[np.ndarray]) -> bool:
        """`jaxq.kernels.repack.blocks` in NumPy: fill packed, scales and biases, each flat, from uint8[n, nbytes].

        Returns:
          Whether every finite scale and bias is finite in float16, where that is their dtype.
        """
        fits = True
        with np.errstate(over="ignore", invalid="ignore"):
            codes, *floats = self.unpack(blocks)
            leaves[0][...] = (codes if codes.dtype == np.uint32 else pack(codes, self.spec.bits)).reshape(-1)
            for out, values in zip(leaves[1:], floats, strict=True):
                out[...] = values.reshape(-1)
                fits &= out.dtype != np.float16 or not np.any(np.isinf(out) & ~np.isinf(values.reshape(-1)))
        return bool(fits)


def _planes(packed: np.ndarray, width: int, bits: int) -> np.ndarray:
    """uint8[n, B] -> codes uint8[n, B * 8 / bits].

    In each chunk of `width` bytes, the lowest `bits` of all bytes come first, then the next `bits` of all bytes.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    codes = packed.reshape(len(packed), -1, 1, width) >> shifts
    codes &= np.uint8(2**bits - 1)
    return codes.reshape(len(packed), -1)


def _nibbles(packed: np.ndarray, width: int) -> np.ndarray:
    """`_planes(packed, width, 4)` packed, uint32[n, B / 4]; faster, as no code is ever spread over a byte."""
    pairs = np.ascontiguousarray(packed).view(np.uint16)  # of a pair of bytes: the codes 2 i and 2 i + 1 of two planes
    words = np.empty((pairs.size * 2 // width, 2, width // 16), np.uint64)
    for plane, shift in enumerate((0, 4)):
        codes = pairs >> np.uint16(4 + shift)
        codes &= np.uint16(0xF0)
        codes |= (pairs >> np.uint16(shift)) & np.uint16(0x0F)
        words[:, plane] = codes.astype(np.uint8).view(np.uint64).reshape(len(words), -1)
    return words.view(np.uint32).reshape(len(packed), -1)


def _fp16(blocks: np.ndarray, at: int) -> np.ndarray:
    """The fp16 that begins at byte `at`, as float32[n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _q4_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    d = _fp16(blocks, 0)
    return _nibbles(blocks[:, 2:], 16), d, -8 * d


def _q4_1(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return _nibbles(blocks[:, 4:], 16), _fp16(blocks, 0), _fp16(blocks, 2)


def _fifth_bit(codes: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The bits of `high`, the lowest of byte 0 first, above the four of `codes`."""
    return codes | np.unpackbits(np.ascontiguousarray(high), axis=1, bitorder="little") << np.uint8(4)


def _q5_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    d = _fp16(blocks, 0)
    return _fifth_bit(_planes(blocks[:, 6:], 16, 4), blocks[:, 2:6]), d, -16 * d


def _q5_1(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return _fifth_bit(_planes(blocks[:, 8:], 16, 4), blocks[:, 4:8]), _fp16(blocks, 0), _fp16(blocks, 2)


def _q8_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    d = _fp16(blocks, 0)
    return blocks[:, 2:] ^ np.uint8(0x80), d, -128 * d  # int8 + 128


def _q2_k(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    d, dmin = _fp16(blocks, 80), _fp16(blocks, 82)
    scales = blocks[:, :16]
    return _planes(blocks[:, 16:80], 32, 2), d * (scales & np.uint8(15)), -dmin * (scales >> np.uint8(4))


def _q3_k(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    codes = _planes(blocks[:, 32:96], 32, 2) | _planes(blocks[:, :32], 32, 1) << np.uint8(2)
    # Sixteen 6-bit scales: the low halves in the nibbles of 8 bytes, the high quarters in the pairs of 4.
    scales = _planes(blocks[:, 96:104], 8, 4) | _planes(blocks[:, 104:108], 4, 2) << np.uint8(4)
    scales = _fp16(blocks, 108) * (scales.astype(np.float32) - 32)
    return codes, scales, -4 * scales


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases of Q4_K and Q5_K, float32[n, 8]: 6-bit numbers in bytes 4 to 15.

    Of these 12, the first four hold scales 0 to 3 and, in their top pairs, the tops of scales 4 to 7; the next four
    the mins likewise; the last four the bottoms of 4 to 7, a scale's in the low nibble and a min's in the high one.
    """
    low, high, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    top = np.uint8(0x30)
    scales = np.concatenate([low & np.uint8(63), rest & np.uint8(15) | low >> np.uint8(2) & top], axis=1)
    mins = np.concatenate([high & np.uint8(63), rest >> np.uint8(4) | high >> np.uint8(2) & top], axis=1)
    return _fp16(blocks, 0) * scales, -_fp16(blocks, 2) * mins


def _q4_k(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return _nibbles(blocks[:, 16:], 32), *_k_scales(blocks)


def _q5_k(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    codes = _planes(blocks[:, 48:], 32, 4) | _planes(blocks[:, 16:48], 32, 1) << np.uint8(4)
    return codes, *_k_scales(blocks)


def _q6_k(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    codes = _planes(blocks[:, :128], 64, 4) | _planes(blocks[:, 128:192], 32, 2) << np.uint8(4)
    scales = _fp16(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return codes, scales, -32 * scales


def _ternary(digits: np.ndarray, width: int, count: int) -> np.ndarray:
    """uint8[n, B] -> codes uint8[n, B * count]: digits in base 3, first the highest one of all `width` bytes.

    A byte is a fraction of 256, rounded up: multiplying by 3 modulo 256 drops a digit, and the integer part of that
    product is it.
    """
    powers = np.array([3**i for i in range(count)], np.uint8)[:, None]
    shifted = digits.reshape(len(digits), -1, 1, width) * powers
    return (shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(digits), -1)


def _tq1_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    parts = [_ternary(blocks[:, :32], 32, 5), _ternary(blocks[:, 32:48], 16, 5), _ternary(blocks[:, 48:52], 4, 4)]
    d = np.repeat(_fp16(blocks, 52), 2, axis=1)  # 256 weights are two of the widest groups
    return np.concatenate(parts, axis=1), d, -d


def _tq2_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    d = np.repeat(_fp16(blocks, 64), 2, axis=1)
    return _planes(blocks[:, :64], 32, 2), d, -d


def _mxfp4(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return _nibbles(blocks[:, 1:], 16), blocks[:, :1]


_HALF, _FULL = np.float16, np.float32

BLOCKS: dict[str, BlockType] = {
    "Q4_0": BlockType(32, 18, QuantSpec(4, 32), _HALF, _q4_0),
    "Q4_1": BlockType(32, 20, QuantSpec(4, 32), _HALF, _q4_1),
    "Q5_0": BlockType(32, 22, QuantSpec(5, 32), _HALF, _q5_0),
    "Q5_1": BlockType(32, 24, QuantSpec(5, 32), _HALF, _q5_1),
    "Q8_0": BlockType(32, 34, QuantSpec(8, 32), _HALF, _q8_0),
    "Q2_K": BlockType(256, 84, QuantSpec(2, 16), _FULL, _q2_k),
    "Q3_K": BlockType(256, 110, QuantSpec(3, 16), _FULL, _q3_k),
    "Q4_K": BlockType(256, 144, QuantSpec(4, 32), _FULL, _q4_k),
    "Q5_K": BlockType(256, 176, QuantSpec(5, 32), _FULL, _q5_k),
    "Q6_K": BlockType(256, 210, QuantSpec(6, 16), _FULL, _q6_k),
    "TQ1_0": BlockType(256, 54, QuantSpec(2, 128), _HALF, _tq1_0),
    "TQ2_0": BlockType(256, 66, QuantSpec(2, 128), _HALF, _tq2_0),
    "MXFP4": BlockType(32, 17, QuantSpec(mode="mxfp4"), np.uint8, _mxfp4),
}
