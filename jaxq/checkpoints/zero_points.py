"""What GPTQ and AWQ share: layers of `qweight`, `qzeros` and `scales`, whose zero points become biases.

`w = scales * (code - zero)` is `scales * code + biases` with `biases = -scales * zero`. In float32 that is exact: a
float16 scale has 11 bits, and code and zero point have 8 at most. A float16 or bfloat16 bias is exact where the zero
point is a power of two, as in symmetric checkpoints, whose zero point is 2**(bits-1).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxq.array import QuantizedArray
from jaxq.checkpoints import safetensors
from jaxq.checkpoints.entries import Checkpoint, Entry, dense
from jaxq.checkpoints.files import empty, read_json, refuse
from jaxq.checkpoints.safetensors import Tensor
from jaxq.kernels import repack
from jaxq.spec import QuantSpec

PARTS = ("qweight", "qzeros", "scales")
_GROUPS = (128, 64, 32, 16)
_FLOATS = ("float16", "bfloat16", "float32")
# Bytes of qweight that are transposed at a time: the more, the more of a row of ours is written at once, but more of
# them leave the caches. Compiled, and in NumPy.
_PIECE, _NUMPY_PIECE = 2 << 20, 1 << 20
# Scales whose biases are made at a time: larger temporaries are new pages each time.
_FLOATS_AT_A_TIME = 1 << 14


@dataclasses.dataclass(frozen=True)
class Layer:
    """A quantized layer as it stands in the file, its shapes checked.

    Attributes:
      name: of the weight that it makes, `X.weight`.
      parts: qweight, qzeros, scales, and g_idx where there is one.
      shape: [N, K] of the weight.
      bits, group_size: the file's own; `group_size` may be any multiple of 16 or the whole of K.
    """

    path: Path
    name: str
    parts: dict[str, Tensor]
    shape: tuple[int, int]
    bits: int
    group_size: int

    @property
    def spec(self) -> QuantSpec:
        """The format that holds it: the widest legal groups that divide the file's, whose scales repeat in them."""
        common = math.gcd(self.group_size, self.shape[1])
        legal = next((group for group in _GROUPS if common % group == 0), None)
        if legal is None:
            what = f"has groups of {self.group_size} in rows of {self.shape[1]}; 16 must divide both"
            raise refuse(self.path, what, self.name)
        return QuantSpec(self.bits, legal)

    @property
    def stored_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def affine(
        self,
        out: Sequence[np.ndarray],
        *,
        order: repack.Order,
        less: int,
        unpack: Callable[[np.ndarray], np.ndarray],
        exact: bool,
    ) -> None:
        """Fill `out` with scales and biases [N, K / spec.group_size], in its dtype.

        Args:
          order: of the zero points in a word of the file; see `repack.groups`.
          less: what is stored is so much less than the zero point, modulo 2**bits.
          unpack: the same in NumPy: words [G, W] to zero points uint8[G, N].

        Raises:
          CheckpointError: that dtype overflows or, with `exact`, rounds.
        """
        scales, words = self.parts["scales"].read(), self.parts["qzeros"].read()
        repeats, outputs = self.group_size // self.spec.group_size, scales.shape[1]
        if repack.available():
            kept = repack.groups(scales, words, out, bits=self.bits, order=order, less=less, repeats=repeats)
            self._check_kept(kept, out[0].dtype, exact)
            return
        zeros = unpack(words)
        step = max(_FLOATS_AT_A_TIME // len(scales), 1)
        for piece in (slice(start, start + step) for start in range(0, outputs, step)):
            # Adding zero leaves one zero, of the sign that MLX's have.
            biases = np.float32(0) - scales[:, piece].astype(np.float32) * zeros[:, piece]
            for target, values in zip(out, (scales[:, piece], biases), strict=True):
                rows = np.repeat(self._cast(values, target.dtype, exact), repeats, axis=0)
                target[piece] = rows[: target.shape[1]].T  # the last group may be cut

    def _cast(self, values: np.ndarray, dtype: np.dtype, exact: bool) -> np.ndarray:
        with np.errstate(over="ignore"):
            cast = values.astype(dtype, copy=False)
        if dtype == np.float32 or dtype == values.dtype:
            return cast
        if np.any(np.isinf(cast) & ~np.isinf(values)):
            self._check_kept("beyond", dtype, exact)
        if exact and not np.array_equal(cast.astype(np.float32), values.astype(np.float32), equal_nan=True):
            self._check_kept("rounded", dtype, exact)
        return cast

    def _check_kept(self, kept: str, dtype: np.dtype, exact: bool) -> None:
        if kept == "beyond":
            raise refuse(self.path, f"its scales or biases are beyond {dtype}; pass scale_dtype=float32", self.name)
        if exact and kept == "rounded":
            what = f"is not symmetric, as the config says; {dtype} rounds its biases: pass scale_dtype"
            raise refuse(self.path, what, self.name)


def find_layers(
    path: Path,
    tensors: Mapping[str, Tensor],
    shape_of: Callable[[dict[str, Tensor]], tuple[tuple[int, int], int]],
    optional: tuple[str, ...] = (),
) -> tuple[list[Layer], dict[str, Entry]]:
    """The quantized layers of a checkpoint, and the entries of all other tensors.

    Args:
      shape_of: a layer's ((N, K), bits) from its parts; raises ValueError where they contradict each other.
      optional: parts that a layer may have beside `PARTS`.

    Raises:
      CheckpointError: a layer with a part missing, or of a wrong dtype or shape, by tensor name.
    """
    prefixes = {name.rpartition(".")[0] for name in tensors if name.endswith((".qweight", ".qzeros"))}
    parts_of = {p: {k: tensors[f"{p}.{k}"] for k in (*PARTS, *optional) if f"{p}.{k}" in tensors} for p in prefixes}
    taken = {tensor.name for parts in parts_of.values() for tensor in parts.values()}
    layers = []
    for prefix in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        if prefix in prefixes:
            layers.append(_check_layer(path, prefix, parts_of[prefix], shape_of, tensors))
    return layers, {name: tensor.entry for name, tensor in tensors.items() if name not in taken}


def _check_layer(
    path: Path,
    prefix: str,
    parts: dict[str, Tensor],
    shape_of: Callable[[dict[str, Tensor]], tuple[tuple[int, int], int]],
    tensors: Mapping[str, Tensor],
) -> Layer:
    for kind in PARTS:
        if kind not in parts:
            raise refuse(path, f"{prefix}.{kind} is missing", next(iter(parts.values())).name)
        if len(parts[kind].shape) != 2:
            raise refuse(path, f"has shape {parts[kind].shape}; two axes are due", parts[kind].name)
        allowed = _FLOATS if kind == "scales" else ("int32", "uint32")
        if parts[kind].dtype.name not in allowed:
            raise refuse(path, f"has dtype {parts[kind].dtype}; it must be {' or '.join(allowed)}", parts[kind].name)
    if f"{prefix}.weight" in tensors:
        raise refuse(path, f"stands beside {prefix}.qweight, which makes a tensor of the same name", f"{prefix}.weight")
    if not all(math.prod(parts[kind].shape) for kind in PARTS):
        raise refuse(path, "is empty", f"{prefix}.qweight")
    try:
        shape, bits = shape_of(parts)
    except ValueError as error:
        raise refuse(path, str(error), f"{prefix}.qweight") from None
    size = -(-shape[1] // parts["scales"].shape[0])
    return Layer(path, f"{prefix}.weight", parts, shape, bits, size)


def make_entry(layer: Layer, scale_dtype: np.dtype | None, kind: str, read: Callable[..., Any]) -> Entry:
    """The entry of a layer that becomes a QuantizedArray; `read(abstract)` gives its leaves."""
    spec, (n, k) = layer.spec, layer.shape
    scales = dense((n, spec.groups(k)), layer.parts["scales"].dtype if scale_dtype is None else scale_dtype)
    packed = dense((n, spec.words(k)), np.uint32)
    try:
        abstract = QuantizedArray.from_packed(packed, scales, scales, bits=spec.bits, group_size=spec.group_size)
    except ValueError as error:
        raise refuse(layer.path, str(error), layer.name) from None
    return Entry(abstract, kind, layer.stored_bytes, lambda: read(abstract))


def repack_words(layer: Layer, order: repack.Order, out: np.ndarray) -> None:
    """Fill `out` with the layer's packed words, by the compiled library. A batch of rows is a cache line of `out`."""
    qweight, multiple = layer.parts["qweight"], {"gptq": 16, "awq": 128}[order]
    batch = _rows_at_a_time(qweight, multiple, _PIECE)
    rows, columns = qweight.shape
    done = repack.file_words(order, qweight.source.descriptor, qweight.offset, (rows, columns), out, batch=batch)
    qweight.source.check_read(qweight.offset, done * 4 * columns, qweight.nbytes, qweight.name)


def pieces(qweight: Tensor, multiple: int) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, these rows, until the next ones are asked for) over a tensor, a multiple of so many rows at a time."""
    total, width = qweight.shape
    step = _rows_at_a_time(qweight, multiple, _NUMPY_PIECE)
    buffer = empty((min(step, total), width), qweight.dtype)
    for start in range(0, total, step):
        words = buffer[: total - start]
        qweight.read_rows_into(words, start)
        yield slice(start, start + len(words)), words


def _rows_at_a_time(qweight: Tensor, multiple: int, nbytes: int) -> int:
    return max(nbytes // (4 * qweight.shape[1]) // multiple, 1) * multiple


# ---- configs


def method_config(path: Path) -> dict[str, Any]:
    """The `quantization_config` of `config.json`, or what AutoGPTQ and AutoAWQ wrote beside it; {} without one."""
    config = safetensors.read_config(path).get("quantization_config")
    for name in ("quantize_config.json", "quant_config.json"):
        beside = (path if path.is_dir() else path.parent) / name
        if config is None and beside.is_file():
            config = read_json(beside)
    if config is not None and not isinstance(config, dict):
        raise refuse(path, f"config.json: quantization_config is {str(config)[:100]}, no JSON object")
    return config or {}


def check_config(path: Path, layers: list[Layer], bits: Any, group_size: Any) -> list[Layer]:
    """The layers with the config's group size, after a check of it and of the bits; None where the config has none.

    A group size needs the config: rows of 128 in two groups may be groups of 64, or of 96 and 32.
    """
    checked = []
    for layer in layers:
        if bits is not None and (type(bits) is not int or bits != layer.bits):
            what = f"has {layer.bits} bits by its shapes, but the config says {str(bits)[:100]}"
            raise refuse(path, what, layer.name)
        k, groups = layer.shape[1], layer.parts["scales"].shape[0]
        length = layer.group_size if group_size is None else k if group_size == -1 else group_size
        if type(length) is not int or length < 1 or -(-k // length) != groups:
            what = f"has {groups} groups in rows of {k}, but the config says group_size={str(group_size)[:100]}"
            raise refuse(path, what, layer.name)
        checked.append(dataclasses.replace(layer, group_size=min(length, k)))
    return checked


def choose_dtype(function: str, scale_dtype: Any, *, symmetric: bool) -> np.dtype | None:
    """The dtype of scales and biases; None for the file's own, which is exact in symmetric checkpoints."""
    if scale_dtype is None:
        return None if symmetric else np.dtype(np.float32)
    dtype = np.dtype(scale_dtype)
    if dtype.name not in _FLOATS:
        raise TypeError(f"{function}: scale_dtype={dtype.name}; pass {', '.join(_FLOATS)}, or None")
    return dtype


def checkpoint(path: Path, format: str, tensors: Mapping[str, Tensor], made: dict[str, Entry]) -> Checkpoint:
    """The entries in the order of the file."""
    order = {name: i for i, name in enumerate(tensors)}
    place = lambda name: order.get(name, order.get(name.removesuffix("weight") + "qweight", 0))  # noqa: E731
    entries = {name: made[name] for name in sorted(made, key=place)}
    return Checkpoint(path, format, safetensors.read_config(path), entries)
