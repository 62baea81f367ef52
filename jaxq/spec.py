"""Quantization formats: which are legal, and every shape and dtype that follows from one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import ml_dtypes
import numpy as np

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]

# mode -> legal bits, legal group sizes, (default bits, default group size). The defaults are MLX's.
_FORMATS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (16, 32, 64, 128), (4, 64)),
    "mxfp4": ((4,), (32,), (4, 32)),
    "mxfp8": ((8,), (32,), (8, 32)),
    "nvfp4": ((4,), (16,), (4, 16)),
}

# The narrowest dtype that exists and holds a code. NumPy has no 3-, 5- or 6-bit integers, so those report
# the next wider one; `QuantSpec.bits` stays exact.
_AFFINE_DTYPES = {
    2: ml_dtypes.int2,
    3: ml_dtypes.int4,
    4: ml_dtypes.int4,
    5: np.int8,
    6: np.int8,
    8: np.int8,
}
_FLOAT_DTYPES = {
    "mxfp4": ml_dtypes.float4_e2m1fn,
    "mxfp8": ml_dtypes.float8_e4m3fn,
    "nvfp4": ml_dtypes.float4_e2m1fn,
}

WORD_BITS = 32


@dataclasses.dataclass(frozen=True, slots=True)
class QuantSpec:
    """A quantization format: `bits` per code, `group_size` codes that share a scale, and the `mode`.

    Modes:
      affine: unsigned codes, `w = scales * code + biases`; bits 2, 3, 4, 5, 6, 8; groups of 16, 32, 64, 128.
      mxfp4:  E2M1 codes with one E8M0 scale per 32 (OCP Microscaling Formats v1.0).
      mxfp8:  E4M3 codes with one E8M0 scale per 32 (OCP Microscaling Formats v1.0).
      nvfp4:  E2M1 codes with one E4M3 scale per 16.

    `bits` and `group_size` may be left out and take MLX's default for the mode. Frozen and hashable, so it can
    be a static argument of `jax.jit`.

    Raises:
      ValueError: for a combination that is no legal format.
      TypeError: for a `bits` or `group_size` that is no int.
    """

    bits: int = 0
    group_size: int = 0
    mode: Mode = "affine"

    # The implementation that holds the weight's data outside JAX; None where the leaves are the data.
    held_by: ClassVar[str | None] = None

    def __init__(self, bits: int | None = None, group_size: int | None = None, mode: Mode = "affine"):
        if mode not in _FORMATS:
            raise ValueError(f"QuantSpec: mode={mode!r} is unknown; pick one of {', '.join(get_args(Mode))}")
        legal_bits, legal_groups, defaults = _FORMATS[mode]
        for name, value, default, legal in (
            ("bits", bits, defaults[0], legal_bits),
            ("group_size", group_size, defaults[1], legal_groups),
        ):
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"QuantSpec: {name}={value!r} is a {type(value).__name__}; pass an int")
            if value not in legal:
                raise ValueError(
                    f"QuantSpec: {name}={value} is not legal in mode {mode!r}; pick one of {', '.join(map(str, legal))}"
                )
            object.__setattr__(self, name, int(value))
        object.__setattr__(self, "mode", str(mode))

    @property
    def is_affine(self) -> bool:
        """Whether a group has a bias and its scale is a float of the weight's own dtype."""
        return self.mode == "affine"

    @property
    def max_code(self) -> int:
        """The largest code, 2**bits - 1."""
        return 2**self.bits - 1

    @property
    def dtype(self) -> np.dtype:
        """The logical dtype: int2, int4 (3 and 4 bits), int8 (5, 6 and 8 bits), float4_e2m1fn or float8_e4m3fn."""
        return np.dtype(_AFFINE_DTYPES[self.bits] if self.is_affine else _FLOAT_DTYPES[self.mode])

    @property
    def bits_per_weight(self) -> float:
        """Storage per weight in bits with 16-bit scales and biases (8-bit scales in the float modes)."""
        return self.bits + (32 if self.is_affine else 8) / self.group_size

    @property
    def length_multiple(self) -> int:
        """What the length of a quantized axis must be a multiple of: whole groups, in whole 32-bit words.

        Differs from `group_size` only for odd bits in groups of 16: 16 codes of 3 bits are a word and a half.
        """
        return self.group_size if self.group_size * self.bits % WORD_BITS == 0 else 2 * self.group_size

    def words(self, length: int) -> int:
        """How many uint32 words hold `length` codes."""
        return length * self.bits // WORD_BITS

    def length(self, words: int) -> int:
        """How many codes stand in `words` uint32 words."""
        return words * WORD_BITS // self.bits

    def groups(self, length: int) -> int:
        """How many groups `length` codes make."""
        return length // self.group_size

    def grouped(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape [..., K] with its last axis split into groups: [..., K / group_size, group_size]."""
        *lead, length = shape
        return (*lead, self.groups(length), self.group_size)

    def scale_dtype(self, dtype: np.dtype | type) -> np.dtype:
        """The dtype that the scales of a weight of `dtype` are stored in: the same, or uint8 in the float modes."""
        return np.dtype(dtype) if self.is_affine else np.dtype(np.uint8)

    # What a weight's leaves say of it; a format whose data is held outside JAX overrides these.

    @property
    def leaf_count(self) -> int:
        """How many leaves a weight has: packed, scales and, in mode affine, biases."""
        return 3 if self.is_affine else 2

    def storage_shape(self, packed: Sequence[int]) -> tuple[int, ...]:
        """The weight's shape in storage order, [..., N, K], from that of packed, [..., N, K * bits / 32]."""
        *lead, words = packed
        return (*lead, self.length(words))

    def float_dtype(self, scales: np.dtype | type | None) -> np.dtype:
        """What a weight with scales of that dtype dequantizes to by default."""
        return np.dtype(scales) if self.is_affine else np.dtype(ml_dtypes.bfloat16)

    def __str__(self) -> str:
        """As it prints in a jaxpr: `int4g64`, `mxfp4`."""
        return f"int{self.bits}g{self.group_size}" if self.is_affine else self.mode

    def __repr__(self) -> str:
        return f"QuantSpec(bits={self.bits}, group_size={self.group_size}, mode={self.mode!r})"
