"""`mlx`: MLX's kernels, called back from XLA's cpu platform. On Apple Silicon they run on the GPU, over unified memory.

How a call goes: XLA hands the operands to a Python callback as NumPy arrays; the callback hands them to one worker
thread, which alone calls MLX (MLX keeps a stream thread for every thread that ever called it); the result goes back as
a view of MLX's memory. The callback never touches JAX, so it can't wait for itself. `jaxq.resident` keeps weights on
MLX's side, so that a call moves nothing but activations.

Where it runs: on MLX's default device at the time of the call, `mlx.core.set_default_device`; but `quantize` always on
MLX's CPU, since its Metal kernel gives other bits (a range that always includes 0, ties away from zero).

What it computes: operands are widened to float32, which is exact, and results rounded once. MLX's kernels would take
float16 and bfloat16 as they come, but on the CPU they then sum in that dtype: with 4096 terms in bfloat16 the error is
a tenth of the result, and the call takes eight times as long. Sums run in another order than those of `xla`, within
the same bound. On GPUs with matrix units MLX multiplies float32 in TF32 unless MLX_ENABLE_TF32=0 is set.

What it does not do: affine groups of 16; programs that XLA partitions over several devices, except in `jax.shard_map`;
modules for several platforms; `jax.export`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import queue
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from jax.interpreters import mlir

from jaxq.lowerings.partition import automatic_devices
from jaxq.spec import QuantSpec

NAME = "mlx"
PLATFORMS = ("cpu",)

# The one whose bits were compared, as in pyproject.toml; to 0.32.0 MLX rounds the scales of mxfp4 and mxfp8 to nearest.
_OLDEST = (0, 32, 4)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_POISON = {"mxfp4": 0xFF, "mxfp8": 0xFF, "nvfp4": 0x7F}


@functools.cache
def unavailable() -> str | None:
    try:
        import mlx.core as mx
    except ImportError as error:
        return f"mlx can't be imported ({error}); install the extra of that name: jaxq[mlx]"
    if tuple(int(part) for part in mx.__version__.split(".")[:3]) < _OLDEST:
        return f"mlx {mx.__version__} is too old; {'.'.join(map(str, _OLDEST))} or newer is needed"
    return None


def refuses(op: str, *, spec: QuantSpec) -> str | None:
    if spec.is_affine and spec.group_size == 16:
        return "MLX has affine groups of 32, 64 and 128, not of 16"
    return None


def unsuited(ctx: mlir.LoweringRuleContext) -> str | None:
    """Why a callback can't stand in the program that is being lowered."""
    if len(ctx.module_context.platforms) > 1:
        return "a program for several platforms can't call back to Python"
    if ctx.module_context.lowering_parameters.for_export:
        return "an exported program can't call back to Python"
    devices = automatic_devices(ctx)
    if devices > 1:
        return (
            f"the program is partitioned over {devices} devices, and MLX's calls can't be; wrap them in jax.shard_map"
        )
    return None


def lower(
    ctx: mlir.LoweringRuleContext, op: str, operands: Sequence[Any], *, implementation: str | None, **parameters: Any
) -> Any:
    """A callback in the place of the operation."""
    run = functools.partial(_RUN[op], **parameters)
    avals_in: Any = ctx.avals_in  # a sequence of abstract values, which JAX annotates as shaped arrays

    def callback(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        return on_worker(run, *arrays)

    results, _, _ = mlir.emit_python_callback(
        ctx,
        callback,
        None,
        list(operands),
        avals_in,
        ctx.avals_out,
        has_side_effect=False,
        returns_token=False,
    )
    return results


# ---- the worker


class _Worker(threading.Thread):
    """Runs one call after another. A daemon, so that programs still in flight at exit find it alive."""

    def __init__(self) -> None:
        super().__init__(name="jaxq-mlx", daemon=True)
        self.calls: queue.SimpleQueue[tuple[Callable[[], None], threading.Lock]] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while True:
            call, done = self.calls.get()
            call()
            done.release()
            del call, done  # or the operands of this call would live until the next


_start = threading.Lock()
_worker: _Worker | None = None


def on_worker(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) on the one thread that calls MLX; waits for it, and raises what it raises."""
    global _worker
    if threading.current_thread() is _worker:
        return function(*args)
    if _worker is None:
        with _start:
            _worker = _worker or _Worker()
    outcome: list[Any] = [None, None]

    def call() -> None:
        try:
            outcome[0] = function(*args)
        except BaseException as error:
            outcome[1] = error

    done = threading.Lock()
    done.acquire()
    _worker.calls.put((call, done))
    done.acquire()
    result, error = outcome
    if error is not None:
        raise error
    return result


# ---- NumPy to MLX and back. What follows runs on the worker; `mx` is imported there, not with jaxq.


def _to_mlx(array: np.ndarray) -> Any:
    import mlx.core as mx

    if array.dtype == _BFLOAT16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def _to_numpy(array: Any, dtype: np.dtype) -> np.ndarray:
    """A view of MLX's memory, computed first where it is not yet; `array` is of that dtype."""
    import mlx.core as mx

    if dtype == _BFLOAT16:
        return np.asarray(array.view(mx.uint16)).view(_BFLOAT16)
    return np.asarray(array)


def _mlx_dtype(dtype: np.dtype) -> Any:
    import mlx.core as mx

    return getattr(mx, dtype.name)


# ---- weights


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
    """A weight's data in MLX: packed uint32[..., N, W]; scales and biases [..., N, G], float32 in mode affine.

    `poisoned`, bool[..., N, G], says which groups of a float mode are NaN, and is None where none is: MLX reads the
    scale 0xFF of E8M0 as infinity.
    """

    packed: Any
    scales: Any
    biases: Any = None
    poisoned: Any = None

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.packed, self.scales, self.biases, self.poisoned) if a is not None)


def load(packed: np.ndarray, scales: np.ndarray, biases: np.ndarray | None = None, *, spec: QuantSpec) -> Weight:
    import mlx.core as mx

    if spec.is_affine:
        assert biases is not None
        return Weight(_to_mlx(packed), *(_to_mlx(a).astype(mx.float32) for a in (scales, biases)))
    poisoned = scales & np.uint8(0x7F) == 0x7F if spec.mode == "nvfp4" else scales == 0xFF
    return Weight(_to_mlx(packed), _to_mlx(scales), None, mx.array(poisoned) if poisoned.any() else None)


# Weights that `jaxq.resident` holds, by the number that stands for each in JAX, a uint32. Numbers are never used twice,
# and start anywhere, so that one that was saved by another process finds nothing here instead of the wrong weight.
_held: dict[int, Weight] = {}
_numbers = itertools.count(secrets.randbelow(2**31))
_numbering = threading.Lock()


def hold(weights: Iterable[Weight]) -> list[int]:
    """Keep weights until `drop`; their numbers."""
    import mlx.core as mx

    weights = list(weights)
    mx.eval([a for w in weights for a in (w.packed, w.scales, w.biases, w.poisoned) if a is not None])
    with _numbering:
        numbers = [next(_numbers) for _ in weights]
    _held.update(zip(numbers, weights, strict=True))
    return numbers


def drop(numbers: Iterable[int]) -> None:
    """Forget weights. Safe on any thread, also from a finalizer: calls under way keep what they use."""
    for number in numbers:
        _held.pop(number, None)


def _find(number: int) -> Weight:
    weight = _held.get(int(number))
    if weight is None:
        raise RuntimeError(
            "jaxq.resident: the data of this weight is gone: what jaxq.resident returned was closed or collected, or "
            "belongs to another process; keep it alive while its weights are in use"
        )
    return weight


def _weights(leaves: Sequence[np.ndarray], spec: QuantSpec) -> list[Weight]:
    """The weights that an operation's leaves stand for: one batched weight of data, or one per number."""
    if spec.held_by is None:
        return [load(*leaves, spec=spec)]
    return [_find(number) for number in leaves[0].reshape(-1)]


# ---- operations, on NumPy arrays in storage order. Each gives a tuple, as callbacks do.


def _quantize(w: np.ndarray, *, spec: QuantSpec) -> tuple[np.ndarray, ...]:
    """See `jaxq.lowerings.xla.quantize`. MLX's own bits, but for groups with a NaN or an infinity."""
    import mlx.core as mx

    dtypes = [np.dtype(np.uint32), *[spec.scale_dtype(w.dtype)] * (2 if spec.is_affine else 1)]
    *lead, length = w.shape
    if w.size == 0:
        sizes = [spec.words(length), spec.groups(length), spec.groups(length)]
        return tuple(np.zeros((*lead, size), dtype) for size, dtype in zip(sizes, dtypes, strict=False))
    with mx.stream(mx.cpu):
        values = _to_mlx(w)
        groups = values.reshape(*lead, spec.groups(length), spec.group_size)
        finite = mx.all(mx.isfinite(groups), axis=-1)
        clean = bool(mx.all(finite).item())
        if not clean:
            values = mx.where(finite[..., None], groups, mx.zeros_like(groups)).reshape(values.shape)
        packed, *params = mx.quantize(values, group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
        if not clean:
            poison = [mx.array(_POISON.get(spec.mode, math.nan), dtype=p.dtype) for p in params]
            params = [mx.where(finite, p, bad) for p, bad in zip(params, poison, strict=True)]
        mx.eval(packed, *params)
        return tuple(_to_numpy(a, dtype) for a, dtype in zip((packed, *params), dtypes, strict=True))


def _dequantize(*leaves: np.ndarray, spec: QuantSpec, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    shape = spec.storage_shape(leaves[0].shape)
    if math.prod(shape) == 0:
        return (np.zeros(shape, dtype),)
    parts = [_dense(weight, spec).astype(_mlx_dtype(dtype)) for weight in _weights(leaves, spec)]
    return (_gather(parts, shape, dtype),)


def _dense(weight: Weight, spec: QuantSpec) -> Any:
    """float32, as MLX dequantizes it."""
    import mlx.core as mx

    arrays = (weight.packed, weight.scales) if weight.biases is None else (weight.packed, weight.scales, weight.biases)
    w = mx.dequantize(*arrays, group_size=spec.group_size, bits=spec.bits, mode=spec.mode, dtype=mx.float32)
    if weight.poisoned is not None:
        w = mx.where(mx.repeat(weight.poisoned, spec.group_size, axis=-1), math.nan, w)
    return w


def _quantized_matmul(x: np.ndarray, *leaves: np.ndarray, spec: QuantSpec, transpose: bool) -> tuple[np.ndarray, ...]:
    """x[B..., ..., K] by w[B..., N, K], or x[B..., ..., N] where not `transpose`; B... may be empty."""
    import mlx.core as mx

    *lead, rows, length = spec.storage_shape(leaves[0].shape)
    shape = (*x.shape[:-1], rows if transpose else length)
    if math.prod(shape) == 0 or x.size == 0:
        return (np.zeros(shape, x.dtype),)
    batch = math.prod(lead)
    x3 = _to_mlx(x.reshape(batch, -1, x.shape[-1]) if lead else x.reshape(-1, x.shape[-1])).astype(mx.float32)
    if spec.held_by is None:
        leaves = tuple(leaf.reshape(batch, *leaf.shape[-2:]) if lead else leaf for leaf in leaves)
    weights = _weights(leaves, spec)
    inputs = [x3] if len(weights) == 1 else [x3[i] for i in range(batch)]
    parts = [_product(part, weight, spec, transpose) for part, weight in zip(inputs, weights, strict=True)]
    return (_gather([part.astype(_mlx_dtype(x.dtype)) for part in parts], shape, x.dtype),)


def _product(x: Any, weight: Weight, spec: QuantSpec, transpose: bool) -> Any:
    import mlx.core as mx

    y = mx.quantized_matmul(
        x,
        weight.packed,
        weight.scales,
        weight.biases,
        transpose=transpose,
        group_size=spec.group_size,
        bits=spec.bits,
        mode=spec.mode,
    )
    if weight.poisoned is not None:
        # A NaN in a row of the weight, or in a column, is one in the product whatever it is multiplied by.
        bad = mx.any(weight.poisoned, axis=-1 if transpose else -2)
        bad = bad if transpose else mx.repeat(bad, spec.group_size, axis=-1)
        y = mx.where(bad[..., None, :], math.nan, y)
    return y


def _gather(parts: list[Any], shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """One part as it is, several stacked; evaluated together."""
    import mlx.core as mx

    result = parts[0] if len(parts) == 1 else mx.stack(parts)
    mx.eval(result)
    return _to_numpy(result, dtype).reshape(shape)


_RUN: dict[str, Callable[..., tuple[np.ndarray, ...]]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "quantized_matmul": _quantized_matmul,
}
