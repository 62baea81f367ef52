"""GPTQ checkpoints of Hugging Face's layout, as AutoGPTQ, GPTQModel and transformers write them: versions 1 and 2.

A layer X is `X.qweight` int32[K * bits / 32, N], whose columns are our words; `X.qzeros` int32[G, N * bits / 32];
`X.scales` [G, N]; and `X.g_idx` int32[K], each input's group. It loads as one QuantizedArray [N, K], `X.weight`.
Version 1 stores zero points less one. Reading, one is added modulo 2**bits: a zero point lies below 2**bits, so what
is stored as 2**bits - 1 was zero. (AutoGPTQ's kernels disagree there; version 2 was made to end that.)
Where `g_idx` is in no order (`desc_act`), groups hold inputs from all over, which no QuantizedArray can say: such a
layer is refused by name, or loaded dense with `dequantize=True`. Source of the layout: AutoGPTQ's `qlinear_cuda.py`.
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
from jaxq.checkpoints.codes import unpack
from jaxq.checkpoints.entries import Checkpoint, Entry, dense
from jaxq.checkpoints.files import empty, empty_together, refuse
from jaxq.checkpoints.safetensors import Tensor
from jaxq.checkpoints.zero_points import Layer
from jaxq.kernels import repack

_BITS = (2, 3, 4, 8)
# What the packages write for the two versions; others are layouts of single kernels.
_VERSIONS = {None: 1, "gptq": 1, "gptq_v2": 2}
# How much less than the zero point they store.
_LESS = {1: 1, 2: 0}


def open(path: str | os.PathLike[str], *, scale_dtype: Any = None, dequantize: bool = False) -> Checkpoint:
    """Open a GPTQ checkpoint.

    Args:
      path: its directory; `quantization_config` stands in `config.json`, or `quantize_config.json` beside it.
      scale_dtype: of scales and biases: float32, float16 or bfloat16. None: exact, which is the file's own where the
        config says that it is symmetric, and float32 where not. Of an asymmetric one float16 rounds each bias by up to
        2**-11 of itself, bfloat16 scales and biases by up to 2**-8 each.
      dequantize: load layers with `desc_act` dense, in float32.

    Raises:
      CheckpointError: files that are not well-formed, layers whose parts contradict each other or the config, and
        layouts other than versions 1 and 2; by tensor name. No weight is read for that.
    """
    path = Path(path)
    tensors, _ = safetensors.read_headers(path)
    config = zero_points.method_config(path)
    version = _version(path, config)
    dtype = zero_points.choose_dtype("gptq.open", scale_dtype, symmetric=config.get("sym") is True)
    layers, entries = zero_points.find_layers(path, tensors, _shape_of, optional=("g_idx",))
    # GPTQModel overrides bits and group size by layer; then the shapes speak for themselves.
    overridden = bool(config.get("dynamic"))
    for layer in zero_points.check_config(
        path,
        layers,
        None if overridden else config.get("bits"),
        None if overridden else config.get("group_size"),
    ):
        entries[layer.name] = _entry(layer, version, dtype, scale_dtype is None, dequantize)
    return zero_points.checkpoint(path, "gptq", tensors, entries)


def _version(path: Path, config: Mapping[str, Any]) -> int:
    layout = config.get("checkpoint_format")
    if isinstance(layout, str | None) and layout in _VERSIONS and not config.get("is_marlin_format"):
        return _VERSIONS[layout]
    raise refuse(path, f"checkpoint_format {str(layout)[:100]!r} is not read; read are 'gptq' and 'gptq_v2'")


def _shape_of(parts: Mapping[str, Tensor]) -> tuple[tuple[int, int], int]:
    """((N, K), bits) from the shapes alone."""
    (rows, n), (groups, zero_words) = parts["qweight"].shape, parts["qzeros"].shape
    bits = 32 * zero_words // n
    if bits not in _BITS or zero_words * 32 != n * bits:
        made = f"{zero_words} words of zero points for {n} outputs make {32 * zero_words / n:g} bits"
        raise ValueError(f"{made}; GPTQ has {', '.join(map(str, _BITS))}")
    k = rows * 32 // bits
    if k * bits != rows * 32:
        raise ValueError(f"{rows} words of {bits} bits are no whole number of codes")
    if parts["scales"].shape != (groups, n):
        raise ValueError(f"its scales have shape {parts['scales'].shape}, its zero points are for {(groups, n)}")
    if "g_idx" in parts and (parts["g_idx"].shape != (k,) or parts["g_idx"].dtype != np.int32):
        raise ValueError(f"its g_idx is {parts['g_idx'].dtype}{list(parts['g_idx'].shape)}; it must be int32[{k}]")
    return (n, k), bits


def _entry(layer: Layer, version: int, dtype: np.dtype | None, exact: bool, dequantize: bool) -> Entry:
    groups = _unordered_groups(layer)
    kind = f"gptq{layer.bits}g{layer.group_size}"
    if groups is None:
        return zero_points.make_entry(layer, dtype, kind, lambda abstract: _read(layer, version, abstract, exact))
    abstract = dense(layer.shape, np.float32)
    if dequantize:
        return Entry(abstract, kind, layer.stored_bytes, lambda: (_dequantize(layer, version, groups),))
    why = "its groups are of unordered inputs (desc_act), which no QuantizedArray can say"
    return Entry(abstract, kind, layer.stored_bytes, lambda: (), f"{why}; pass dequantize=True to load it dense")


def _unordered_groups(layer: Layer) -> np.ndarray | None:
    """Each input's group, int32[K]; None where that is its index by the group size."""
    if "g_idx" not in layer.parts:
        return None
    groups = layer.parts["g_idx"].read()
    if np.array_equal(groups, np.arange(len(groups)) // layer.group_size):
        return None
    if groups.min() < 0 or groups.max() >= layer.parts["scales"].shape[0]:
        raise refuse(layer.path, "names a group that has no scales", layer.parts["g_idx"].name)
    return groups


def _zeros(words: np.ndarray, bits: int, version: int) -> np.ndarray:
    """qzeros -> the zero points, uint8[G, N] below 2**bits."""
    return unpack(words, bits) + np.uint8(_LESS[version]) & np.uint8(2**bits - 1)


def _read(layer: Layer, version: int, abstract: QuantizedArray, exact: bool) -> list[np.ndarray]:
    leaves = empty_together(abstract.leaves)
    if repack.available():
        zero_points.repack_words(layer, "gptq", leaves[0])
    else:
        for rows, words in zero_points.pieces(layer.parts["qweight"], 16):  # of a cache line each
            leaves[0][:, rows] = words.view(np.uint32).T
    unpack_zeros = functools.partial(_zeros, bits=layer.bits, version=version)
    layer.affine(leaves[1:], order="gptq", less=_LESS[version], unpack=unpack_zeros, exact=exact)
    return leaves


def _dequantize(layer: Layer, version: int, groups: np.ndarray) -> np.ndarray:
    """float32[N, K]: exact, as `scales * (code - zero)` has at most 20 bits where the scales are float16."""
    out = empty(layer.shape, np.float32)
    scales = layer.parts["scales"].read().astype(np.float32)
    zeros = _zeros(layer.parts["qzeros"].read(), layer.bits, version).astype(np.float32)
    for rows, words in zero_points.pieces(layer.parts["qweight"], 96):  # whole codes, whatever the bits
        codes = unpack(words.T, layer.bits).T
        inputs = slice(rows.start * 32 // layer.bits, rows.start * 32 // layer.bits + len(codes))
        out[:, inputs] = ((codes - zeros[groups[inputs]]) * scales[groups[inputs]]).T
    return out
