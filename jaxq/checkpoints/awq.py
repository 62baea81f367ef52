"""AWQ checkpoints of the GEMM layout, as AutoAWQ and transformers write them: 4 bits, any group size.

A layer X is `X.qweight` int32[K, N / 8], `X.qzeros` int32[G, N / 8] and `X.scales` [G, N]. A word holds eight outputs,
in the order of AWQ's kernel: its nibbles, the lowest first, are outputs 0, 2, 4, 6, 1, 3, 5, 7. It loads as one
QuantizedArray [N, K], `X.weight`. Source of the layout: AutoAWQ's `WQLinear_GEMM`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxq.array import QuantizedArray
from jaxq.checkpoints import safetensors, zero_points
from jaxq.checkpoints.entries import Checkpoint
from jaxq.checkpoints.files import empty_together, refuse
from jaxq.checkpoints.safetensors import Tensor
from jaxq.checkpoints.zero_points import Layer
from jaxq.kernels import repack

# Output i of a word stands in nibble _NIBBLE[i].
_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)
# Words of a row repacked at a time. Temporaries beyond 128 kB would be new pages from the system each time.
_WORDS = 64


def open(path: str | os.PathLike[str], *, scale_dtype: Any = None) -> Checkpoint:
    """Open an AWQ checkpoint.

    Args:
      path: its directory; `quantization_config` stands in `config.json`, or `quant_config.json` beside it.
      scale_dtype: of scales and biases: float32, float16 or bfloat16. None: float32, which is exact. float16 rounds
        each bias by up to 2**-11 of itself, bfloat16 scales and biases by up to 2**-8 each.

    Raises:
      CheckpointError: files that are not well-formed, layers whose parts contradict each other or the config, and
        layouts other than GEMM; by tensor name. No weight is read for that.
    """
    path = Path(path)
    tensors, _ = safetensors.read_headers(path)
    config = zero_points.method_config(path)
    version = config.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise refuse(path, f"AWQ version {str(version)[:100]!r} is not read; read is 'gemm'")
    dtype = zero_points.choose_dtype("awq.open", scale_dtype, symmetric=False)
    layers, entries = zero_points.find_layers(path, tensors, _shape_of)
    # Transformers' names, and AutoAWQ's own.
    bits, group_size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    for layer in zero_points.check_config(path, layers, bits, group_size):
        kind = f"awq{layer.bits}g{layer.group_size}"
        entries[layer.name] = zero_points.make_entry(layer, dtype, kind, functools.partial(_read, layer))
    return zero_points.checkpoint(path, "awq", tensors, entries)


def _shape_of(parts: Mapping[str, Tensor]) -> tuple[tuple[int, int], int]:
    """((N, K), bits) from the shapes alone."""
    (k, words), (groups, n) = parts["qweight"].shape, parts["scales"].shape
    if words * 8 != n:
        raise ValueError(f"{words} words for {n} outputs make {32 * words / n:g} bits; AWQ has 4")
    if parts["qzeros"].shape != (groups, words):
        raise ValueError(f"its zero points have shape {parts['qzeros'].shape}; {(groups, words)} is due")
    return (n, k), 4


def _unpack(words: np.ndarray) -> np.ndarray:
    """int32[A, W] -> codes uint8[A, 8 * W], in the order of outputs."""
    shifts = 4 * np.array(_NIBBLE, np.uint32)
    codes = words.view(np.uint32)[..., None] >> shifts & np.uint32(15)
    return codes.astype(np.uint8).reshape(len(words), -1)


def _repack(words: np.ndarray) -> np.ndarray:
    """int32[K, W] -> uint32[8 * W, K / 8]: the codes of `_unpack`, transposed and packed as ours."""
    lanes = np.ascontiguousarray(words.view(np.uint32).T).astype(np.uint64)
    # The eight outputs of a word to the eight bytes of a lane: the even ones from its low half, the odd ones from its
    # high half. Each half's four nibbles go 16 bits apart.
    codes = _spread(lanes & np.uint64(0xFFFF)) | _spread(lanes >> np.uint64(16)) << np.uint64(8)
    pairs = codes[:, 0::2] | codes[:, 1::2] << np.uint64(4)  # of neighbouring inputs, which share a byte of ours
    by_output = pairs.view(np.uint8).reshape(*pairs.shape, 8).swapaxes(1, 2)
    return np.ascontiguousarray(by_output).reshape(8 * len(lanes), -1).view(np.uint32)


def _spread(nibbles: np.ndarray) -> np.ndarray:
    """uint64 of four nibbles, side by side -> each of them 16 bits from the next."""
    nibbles = (nibbles | nibbles << np.uint64(24)) & np.uint64(0x000000FF000000FF)
    return (nibbles | nibbles << np.uint64(12)) & np.uint64(0x000F000F000F000F)


def _read(layer: Layer, abstract: QuantizedArray) -> list[np.ndarray]:
    leaves = empty_together(abstract.leaves)
    if repack.available():
        zero_points.repack_words(layer, "awq", leaves[0])
    else:
        _repack_numpy(layer.parts["qweight"], leaves[0])
    layer.affine(leaves[1:], order="awq", less=0, unpack=_unpack, exact=False)
    return leaves


def _repack_numpy(qweight: Tensor, out: np.ndarray) -> None:
    for rows, words in zero_points.pieces(qweight, 128):  # a cache line of ours
        for first in range(0, words.shape[1], _WORDS):
            outputs = slice(8 * first, 8 * (first + _WORDS))
            out[outputs, rows.start // 8 : rows.stop // 8] = _repack(words[:, first : first + _WORDS])
