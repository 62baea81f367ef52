"""MLX directories, as mlx-lm reads and writes them: `config.json`, and `model*.safetensors` with or without an index.

A quantized layer is three tensors, `X.weight` (uint32 words), `X.scales` and, in mode affine, `X.biases`; they load as
one QuantizedArray by the name `X.weight`. `config["quantization"]` holds `bits`, `group_size` and `mode`, and the same
by layer (`{"model.layers.0.mlp.down_proj": {"bits": 8, ...}}`) where they differ. Whether a layer is quantized, only
the presence of its scales says. Source: mlx-lm's `utils.load_model` and `utils.save_model`.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax

from jaxq.array import QuantizedArray
from jaxq.checkpoints import safetensors
from jaxq.checkpoints.entries import Checkpoint, Entry, dense
from jaxq.checkpoints.files import atomic_directory, count, refuse
from jaxq.checkpoints.safetensors import Tensor
from jaxq.spec import Mode, QuantSpec

# mlx-lm's size of a file.
SHARD_BYTES = 5 << 30


def open(path: str | os.PathLike[str], *, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Open an MLX directory, or a single safetensors file of MLX's.

    Args:
      path: the directory, or the file; then `config.json` is sought beside it.
      config: in place of `config.json`.

    Raises:
      CheckpointError: files that are not well-formed, quantized layers with a part missing or of a wrong dtype or
        shape, and a config that contradicts them; by tensor name. No tensor is read for that.
    """
    path = Path(path)
    tensors, _ = safetensors.read_headers(path)
    config = dict(safetensors.read_config(path) if config is None else config)
    return Checkpoint(path, "mlx", config, _entries(path, tensors, config.get("quantization")))


def _entries(path: Path, tensors: Mapping[str, Tensor], quantization: Any) -> dict[str, Entry]:
    spec_of = _specs(path, quantization)
    entries: dict[str, Entry] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        weight = tensors.get(f"{layer}.weight")
        if kind in ("scales", "biases") and layer:
            if weight is None and quantization is not None:
                raise refuse(path, f"{layer}.weight is missing", name)
            if kind == "biases" and f"{layer}.scales" not in tensors and quantization is not None:
                raise refuse(path, f"{layer}.scales is missing", name)
            if weight is not None and f"{layer}.scales" in tensors:
                continue  # comes with its weight
        if kind == "weight" and f"{layer}.scales" in tensors:
            parts = [tensors.get(f"{layer}.{part}") for part in ("weight", "scales", "biases")]
            entries[name] = _quantized(path, parts, spec_of(layer))
        elif kind == "weight" and tensor.dtype == "uint32" and quantization is not None:
            raise refuse(path, f"{layer}.scales is missing", name)
        else:
            entries[name] = tensor.entry
    return entries


def _quantized(path: Path, parts: list[Tensor | None], spec: QuantSpec) -> Entry:
    there = [part for part in parts if part is not None]
    if spec.is_affine and parts[2] is None:
        raise refuse(path, f"its biases are missing, and mode {spec.mode!r} needs them", there[0].name)
    structs = [None if part is None else part.struct for part in parts]
    try:
        abstract = QuantizedArray.from_packed(*structs, bits=spec.bits, group_size=spec.group_size, mode=spec.mode)
    except (TypeError, ValueError) as error:
        raise refuse(path, f"contradicts its scales, or the config: {error}", there[0].name) from None
    return Entry(abstract, str(spec), sum(part.nbytes for part in there), lambda: [part.read() for part in there])


def _specs(path: Path, quantization: Any) -> Callable[[str], QuantSpec]:
    """layer -> its format, as the config has it."""
    if quantization is None:

        def refuse_all(layer: str) -> QuantSpec:
            what = "has scales, but the config has no `quantization` to say its bits and group size"
            raise refuse(path, what, f"{layer}.weight")

        return refuse_all
    if not isinstance(quantization, dict):
        raise refuse(path, f"config.json: quantization is {str(quantization)[:100]}, no JSON object")

    def spec_of(layer: str) -> QuantSpec:
        fields = quantization.get(layer, quantization)
        if not isinstance(fields, dict):
            raise refuse(path, f"has scales, but the config has {str(fields)[:100]} for it", f"{layer}.weight")
        mode = fields.get("mode", "affine")
        mode = cast(Mode, mode if isinstance(mode, str) else repr(mode))
        try:
            return QuantSpec(fields.get("bits"), fields.get("group_size"), mode)
        except (TypeError, ValueError) as error:
            raise refuse(path, f"config.json: {error}", f"{layer}.weight") from None

    return spec_of


# ---- writing


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    mlx_only: bool = True,
    beside: Iterable[Path] = (),
) -> None:
    """Write an MLX directory, which appears under its name only when it is whole.

    Args:
      path: the directory; it must not exist, or be empty.
      tensors: {name: array or QuantizedArray}. A QuantizedArray's name ends in `.weight`, its axis is -1. An open
        `Checkpoint` will do: its tensors are read as they are written, one at a time.
      config: for `config.json`; its `quantization` is made from the tensors.
      overwrite: replace what stands at `path`.
      shard_bytes: begin a new file before one grows beyond this.
      mlx_only: refuse formats that MLX has no kernels for; False writes them, for jaxq alone to read.
      beside: files to copy into the directory, a tokenizer's for example.

    Raises:
      FileExistsError: `path` exists, and `overwrite` is False.
      ValueError, TypeError: a tensor that can't stand in such a directory, by name.
    """
    entries = {name: _writable(name, tensor, mlx_only) for name, tensor in _items(tensors)}
    specs = {name: abstract.spec for name, abstract in entries.items() if isinstance(abstract, QuantizedArray)}
    config = {key: value for key, value in (config or {}).items() if key not in ("quantization", "quantization_config")}
    if specs:
        # Hugging Face looks for the second name.
        config["quantization"] = config["quantization_config"] = _quantization(specs)
    with atomic_directory(path, overwrite=overwrite) as directory:
        for file in beside:
            shutil.copyfile(file, directory / file.name)
        (directory / "config.json").write_text(json.dumps(config, indent=4, sort_keys=True) + "\n")
        _write_shards(directory, tensors, {name: _parts(name, value) for name, value in entries.items()}, shard_bytes)


def _items(tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names with arrays, or with what an open checkpoint knows of them without reading."""
    if isinstance(tensors, Checkpoint):
        return ((name, entry.abstract) for name, entry in tensors.entries.items())
    return iter(tensors.items())


def _writable(name: str, tensor: Any, mlx_only: bool) -> Any:
    if not isinstance(tensor, QuantizedArray):
        return dense(tensor.shape, tensor.dtype)
    if tensor.spec.held_by is not None:
        raise TypeError(
            f"mlx.save: the data of {name!r} is held by {tensor.spec.held_by}; save the tree that it was made from"
        )
    if not name.endswith(".weight"):
        raise ValueError(
            f"mlx.save: the quantized tensor {name!r} is not named `*.weight`; use jaxq.save, which takes any"
        )
    if tensor.axis != (-1,):
        raise ValueError(
            f"mlx.save: tensor {name!r} has axis={tensor.axis}; MLX groups the last one: pass it transposed"
        )
    if mlx_only and tensor.spec.is_affine and tensor.group_size == 16:
        raise ValueError(
            f"mlx.save: tensor {name!r} is {tensor.spec}, and MLX has no groups of 16; quantize it otherwise, or pass "
            "mlx_only=False for a directory that jaxq alone reads"
        )
    return tensor


def _parts(name: str, abstract: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The tensors of the file that one of ours becomes."""
    if not isinstance(abstract, QuantizedArray):
        return {name: abstract}
    layer = name.removesuffix("weight")
    names = [f"{layer}{part}" for part in ("weight", "scales", "biases")]
    return {n: dense(leaf.shape, leaf.dtype) for n, leaf in zip(names, abstract.leaves, strict=False)}


def _quantization(specs: Mapping[str, QuantSpec]) -> dict[str, Any]:
    """The commonest format for all, and the others by layer."""
    fields = {spec: {"group_size": spec.group_size, "bits": spec.bits, "mode": spec.mode} for spec in specs.values()}
    common = collections.Counter(specs.values()).most_common(1)[0][0]
    layers = {name.removesuffix(".weight"): fields[spec] for name, spec in specs.items() if spec != common}
    return fields[common] | layers


def _write_shards(
    directory: Path, tensors: Mapping[str, Any], parts: Mapping[str, dict[str, Any]], shard_bytes: int
) -> None:
    sizes = {name: sum(count(p.shape) * p.dtype.itemsize for p in layout.values()) for name, layout in parts.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    where: dict[str, str] = {}
    for file, names in zip(files, shards, strict=True):
        layout = dict(itertools.chain.from_iterable(parts[name].items() for name in names))
        stream = itertools.chain.from_iterable(_leaves(parts[name], tensors[name]) for name in names)
        safetensors.write(directory / file, layout, stream, {"format": "mlx"})
        where |= dict.fromkeys(layout, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(where.items()))}
    (directory / safetensors.INDEX).write_text(json.dumps(index, indent=4) + "\n")


def _leaves(layout: Mapping[str, Any], tensor: Any) -> Iterator[tuple[str, Any]]:
    leaves = tensor.leaves if isinstance(tensor, QuantizedArray) else (tensor,)
    return zip(layout, leaves, strict=True)
