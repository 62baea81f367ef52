"""What a command finds out: of a checkpoint's entries, of this machine, and of its speed."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jaxq
from jaxq import kernels
from jaxq.array import QuantizedArray
from jaxq.checkpoints.entries import Entry
from jaxq.checkpoints.files import count
from jaxq.spec import QuantSpec

_PACKAGES = ("jax", "jaxlib", "numpy", "ml_dtypes", "mlx", "jax-mps", "flax", "equinox", "gguf", "safetensors", "rich")


# ---- inspect


def entry_row(name: str, entry: Entry) -> dict[str, Any]:
    """One tensor of a checkpoint, ready for JSON."""
    abstract, weights = entry.abstract, count(entry.shape)
    quantized = isinstance(abstract, QuantizedArray)
    return {
        "name": name,
        "shape": list(entry.shape),
        "stored_as": entry.kind,
        "loads_as": f"{abstract.spec}, scales {abstract.scales.dtype}" if quantized else str(abstract.dtype),
        "weights": weights,
        "stored_bytes": entry.stored_bytes,
        "loaded_bytes": entry.nbytes,
        "bits_per_weight": 8 * entry.stored_bytes / weights if weights else 0.0,
        "problem": entry.problem,
    }


# ---- doctor


def examine() -> dict[str, dict[str, Any]]:
    """Versions, devices, implementations per platform, and instruction sets; None for a package that is absent."""
    return {
        "versions": {"jaxq": jaxq.__version__, "python": platform.python_version()}
        | {name: _installed(name) for name in _PACKAGES},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "backend": jax.default_backend(),
            "devices": [str(device) for device in jax.devices()],
            "interpreter": sys.executable,
        },
        "implementations": jaxq.implementations(),
        "cpu kernels": _instruction_sets(),
    }


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _instruction_sets() -> dict[str, str]:
    """Per instruction set, best first, "usable" or why not; why there are none where there are none."""
    try:
        library = kernels.cpu_library()
    except kernels.KernelsUnavailable as error:
        return {"unavailable": str(error)}
    return {name: why_not or "usable" for name, why_not in kernels.isas(library).items()}


def flat(rows: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of nested mappings and lists."""
    for key, value in rows.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}: ")
        elif isinstance(value, list):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{key}", "not installed" if value is None else str(value)


# ---- bench


def parse_shape(text: str) -> tuple[int, int]:
    """`4096x4096`. Raises ValueError."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{text!r} is no shape; write OUTxIN, such as 4096x4096")
    return int(parts[0]), int(parts[1])


def bench(
    n: int,
    k: int,
    batches: Sequence[int],
    specs: Sequence[QuantSpec],
    names: Sequence[str] | None,
    repeats: int,
) -> list[dict[str, Any]]:
    """Medians of interleaved runs of `x @ w.T`, x bfloat16[batch, k], for every format and implementation.

    Raises:
      ValueError: an implementation that is not usable, a shape that a format's groups don't divide.
    """
    w = jax.random.normal(jax.random.key(0), (n, k), jnp.bfloat16)
    weights: dict[str, Any] = {"float32": w.astype(jnp.float32), "bfloat16": w}
    weights |= {str(spec): _quantized(w, spec) for spec in specs}
    rows = []
    for batch in batches:
        x = jax.random.normal(jax.random.key(1), (batch, k), jnp.bfloat16)
        runs = dict(_runs(x, weights, names))
        times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for repeat in range(repeats + 1):
            for key, run in runs.items():
                start = time.perf_counter()
                jax.block_until_ready(run())
                if repeat:  # the first compiles
                    times[key].append(time.perf_counter() - start)
        dense = statistics.median(times["bfloat16", "jax"])
        for (name, implementation), taken in times.items():
            median = statistics.median(taken)
            rows.append(
                {
                    "weight": name,
                    "implementation": implementation,
                    "batch": batch,
                    "microseconds": 1e6 * median,
                    "gigabytes_per_second": weights[name].nbytes / median / 1e9,
                    "speedup_over_bfloat16": dense / median,
                }
            )
    return rows


def _quantized(w: jax.Array, spec: QuantSpec) -> QuantizedArray:
    return jaxq.quantize(w, bits=spec.bits, group_size=spec.group_size, mode=spec.mode)


def _runs(
    x: jax.Array, weights: Mapping[str, Any], names: Sequence[str] | None
) -> Iterator[tuple[tuple[str, str], Callable[[], jax.Array]]]:
    """((weight, implementation), a run of it)."""
    platform_rows = jaxq.implementations().get(jax.default_backend(), jaxq.implementations()["other"])
    usable = [name for name, state in platform_rows.items() if state in ("usable", "default")]
    for name, w in weights.items():
        if not isinstance(w, QuantizedArray):
            yield (name, "jax"), functools.partial(jax.jit(_dense_product), x, w)
            continue
        for implementation in names or usable:
            product = functools.partial(jaxq.quantized_matmul, implementation=implementation)
            yield (name, implementation), functools.partial(jax.jit(product), x, w)


def _dense_product(x: jax.Array, w: jax.Array) -> jax.Array:
    return x.astype(w.dtype) @ w.T
