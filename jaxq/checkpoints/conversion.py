"""From any checkpoint to an MLX directory, a tensor at a time."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import conventions, reports, tree
from jaxq.array import QuantizedArray
from jaxq.checkpoints import mlx
from jaxq.checkpoints.entries import Checkpoint, Entry, dense
from jaxq.checkpoints.gguf_names import hugging_face
from jaxq.primitives.dequantize import dequantize
from jaxq.primitives.quantize import quantize
from jaxq.progress import track_bytes
from jaxq.spec import QuantSpec

GroupsOf16 = Literal["refuse", "requantize", "keep"]
# What a tokenizer and a generator need beside the weights. No code.
_BESIDE = ("tokenizer*", "vocab.*", "merges.txt", "*_tokens*.json", "chat_template*", "generation_config.json")
_NOT_BESIDE = (".py", ".bin", ".pt", ".safetensors")
# For groups of 16, where nothing else is asked: as fine as the finest of them, 6 bits with float32 scales.
_FOR_GROUPS_OF_16 = QuantSpec(8, 32)


@dataclasses.dataclass(frozen=True)
class Step:
    """What becomes of a tensor: quantized to `spec`, dense where that is None, or kept as it is; and why."""

    keep: bool
    spec: QuantSpec | None
    note: str


def convert(
    source: Checkpoint,
    target: str | os.PathLike[str],
    spec: QuantSpec | None = None,
    *,
    rules: Sequence[tuple[str, QuantSpec | None]] = (),
    dtype: Any = None,
    requantize: bool = False,
    groups_of_16: GroupsOf16 = "refuse",
    overwrite: bool = False,
    progress: bool | None = None,
) -> reports.Report:
    """Write a checkpoint as an MLX directory; no more than one tensor is in memory at a time.

    A dense weight is quantized as the first rule whose pattern is found in its name says, else to `spec`; what
    `quantize_tree` would leave alone stays dense. A quantized one stays as it is, exactly, unless a rule names another
    format.

    A GGUF file's tensors get Hugging Face's names, and its metadata become a `config.json`; see `gguf_names`.

    Args:
      source: the open checkpoint.
      target: the directory to write.
      spec: for dense weights that no rule names; None leaves them dense.
      rules: (regular expression, QuantSpec, or None for dense).
      dtype: float32, float16 or bfloat16: cast dense floats to it, also before they are quantized. None: as they are.
      requantize: bring quantized weights to `spec` too, by way of dense ones: that costs accuracy.
      groups_of_16: what to do with the groups of 16 of GGUF's Q2_K, Q3_K and Q6_K, which MLX has no kernels for:
        "refuse"; "requantize", to `spec`, or to 8 bits in groups of 32 without one; "keep", for jaxq alone to read.
      overwrite: replace what stands at `target`.
      progress: as in `Checkpoint.load`.

    Returns:
      A report: a row per tensor, with its relative error where it was quantized here.

    Raises:
      CheckpointError: a tensor that can't be read; a GGUF file of an unknown architecture.
      ValueError: groups of 16 where they are refused; a weight with a NaN or an infinity; by name. A rule whose pattern
        is found in no name, which would silently change nothing.
    """
    if groups_of_16 not in get_args(GroupsOf16):
        raise ValueError(f"convert: groups_of_16={groups_of_16!r}; pick one of {', '.join(get_args(GroupsOf16))}")
    source.check_served()
    if source.format == "gguf":
        source = hugging_face(source)
    for pattern, _ in rules:
        if not any(re.search(pattern, name) for name in source.entries):
            some = ", ".join(map(repr, list(source.entries)[:3]))
            raise ValueError(f"convert: the rule {pattern!r} is found in no tensor's name; they are like {some}")
    steps = {name: _plan(name, entry, spec, rules, requantize, groups_of_16) for name, entry in source.entries.items()}
    report = reports.Report()
    total = sum(entry.stored_bytes for entry in source.entries.values())
    with track_bytes("convert", total, progress, "converting") as advance:
        entries = {
            name: _converted(name, entry, steps[name], dtype, report, advance) for name, entry in source.entries.items()
        }
        out = Checkpoint(source.path, "mlx", source.config, entries)
        mlx.save(
            target,
            out,
            source.config,
            overwrite=overwrite,
            mlx_only=groups_of_16 != "keep",
            beside=_beside(source.path),
        )
    return report


def _plan(
    name: str,
    entry: Entry,
    spec: QuantSpec | None,
    rules: Sequence[tuple[str, QuantSpec | None]],
    requantize: bool,
    groups_of_16: GroupsOf16,
) -> Step:
    named = [rule for pattern, rule in rules if re.search(pattern, name)]
    wanted = named[0] if named else spec
    if not entry.is_quantized:
        if wanted is None:
            return Step(True, None, "")
        # Conventions go by the parts of a path, which a slash separates.
        leaf = [(name.replace(".", "/"), entry.abstract)]
        (decision,) = conventions.decide(leaf, wanted, conventions.by_name(leaf))
        return Step(decision.spec is None, decision.spec, decision.reason)
    there = entry.abstract.spec
    if named and wanted != there:
        return Step(False, wanted, f"from {entry.kind}, by a rule")
    if requantize and wanted is not None and wanted != there:
        return Step(False, wanted, f"from {entry.kind}")
    if there.is_affine and there.group_size == 16 and groups_of_16 != "keep":
        if groups_of_16 == "requantize":
            return Step(False, wanted or _FOR_GROUPS_OF_16, f"from {entry.kind}, whose groups of 16 MLX has not")
        raise ValueError(
            f"convert: tensor {name!r} is {entry.kind}, in groups of 16, which MLX has no kernels for; pass "
            "groups_of_16='requantize', or 'keep' for a directory that jaxq alone reads"
        )
    return Step(True, there, f"{entry.kind}, kept exactly")


def _converted(
    name: str, entry: Entry, step: Step, dtype: Any, report: reports.Report, advance: Callable[[int], object]
) -> Entry:
    """The entry of the new checkpoint; its `read` reads the old one, converts and reports."""
    cast = dtype if _is_float(entry) and dtype is not None else None
    result: Any = entry.abstract
    if entry.is_quantized and not step.keep:
        cast = cast or result.float_dtype
        result = dense(entry.shape, cast)
    elif not entry.is_quantized and cast is not None:
        result = dense(entry.shape, cast)
    if step.spec is not None and not step.keep:
        fields = dataclasses.asdict(step.spec)
        result = jax.eval_shape(functools.partial(quantize, **fields), result)

    def read() -> Sequence[np.ndarray]:
        array = entry.place(entry.read())
        made = _convert(name, array, step, cast, report)
        advance(entry.stored_bytes)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(made)]

    return Entry(result, str(step.spec or result.dtype), entry.stored_bytes, read)


def _convert(name: str, array: Any, step: Step, cast: Any, report: reports.Report) -> Any:
    if step.keep and isinstance(array, QuantizedArray):
        report.rows.append(reports.row(name, array, note=step.note))
        return array
    if isinstance(array, QuantizedArray):
        array = dequantize(array, cast)
    elif cast is not None:
        array = jnp.asarray(array).astype(cast)
    if step.keep or step.spec is None:
        report.rows.append(reports.row(name, array, note=step.note))
        return array
    spec = step.spec
    own = reports.Report()
    (made,) = tree.quantize_leaves(
        "convert", [(name, array)], lambda path, leaf: (spec, -1), conventions.by_name([]), report=own
    )
    report.rows.append(dataclasses.replace(own.rows[0], note=step.note))
    return made


def _is_float(entry: Entry) -> bool:
    return entry.is_quantized or entry.abstract.dtype.name in ("float32", "float16", "bfloat16")


def _beside(path: Path) -> list[Path]:
    """The files of the source that go with the weights."""
    if not path.is_dir():
        return []
    found = {file for pattern in _BESIDE for file in path.glob(pattern)}
    return sorted(file for file in found if file.is_file() and file.suffix not in _NOT_BESIDE)
