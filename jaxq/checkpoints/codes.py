"""Packing codes on the host, in NumPy: readers must not need a compiler pass, nor a copy of the file on a device."""

from __future__ import annotations

import numpy as np


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes as `jaxq.packing` does: a little-endian bit stream along the last axis.

    Args:
      codes: uint8[..., K], values below 2**bits; K is a multiple of 8 and of 32 / bits. Overwritten.
      bits: 1 to 8.

    Returns:
      uint32[..., K * bits / 32].
    """
    # Eight codes at a time, in one 64-bit lane: move neighbours together, by bytes, then by pairs, then by fours.
    #   bytes  [ 0 c3 | 0 c2 | 0 c1 | 0 c0 ]  ->  pairs  [ 0 0 c3 c2 | 0 0 c1 c0 ]  ->  fours  [ 0 0 0 0 c3 c2 c1 c0 ]
    lanes = np.ascontiguousarray(codes).view(np.uint64)
    if bits < 8:
        moved = np.empty_like(lanes)
        for width, lane_mask in ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF)):
            used = width * bits // 8  # of the `width` bits, by codes
            foot = lane_mask // ((1 << width) - 1) * ((1 << used) - 1)  # these bits of every other field
            np.right_shift(lanes, np.uint64(width - used), out=moved)
            np.bitwise_and(moved, np.uint64(foot << used), out=moved)
            np.bitwise_and(lanes, np.uint64(foot), out=lanes)
            np.bitwise_or(lanes, moved, out=lanes)
    filled = lanes.view(np.uint8).reshape(*lanes.shape, 8)[..., :bits]
    return np.ascontiguousarray(filled).reshape(*codes.shape[:-1], -1).view(np.uint32)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`: codes of a little-endian bit stream along the last axis.

    Args:
      words: 32-bit integers [..., W]; W * 32 is a multiple of bits.
      bits: 1 to 8.

    Returns:
      uint8[..., W * 32 / bits].
    """
    stream = np.ascontiguousarray(words).view(np.uint8)
    if 8 % bits == 0:
        codes = stream[..., None] >> np.arange(0, 8, bits, dtype=np.uint8)
        codes &= np.uint8(2**bits - 1)
        return codes.reshape(*stream.shape[:-1], -1)
    each = np.unpackbits(stream, axis=-1, bitorder="little").reshape(*stream.shape[:-1], -1, bits)
    return (each << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)
