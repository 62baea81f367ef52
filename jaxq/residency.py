"""`resident`: weights whose data MLX holds, with a number in JAX that stands for each."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

from jaxq.array import QuantizedArray, is_quantized
from jaxq.lowerings import mlx
from jaxq.spec import QuantSpec


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class ResidentSpec(QuantSpec):
    """The format of a weight that MLX holds, with what its one leaf, uint32[..., 1, 1] of numbers, can't tell.

    Attributes:
      rows, length: N and K of the weight in storage order, [..., N, K].
      scales_dtype: of the scales that it was made from; what it dequantizes to by default.
    """

    rows: int = 0
    length_: int = 0
    scales_dtype: str = ""

    held_by: ClassVar[str | None] = mlx.NAME

    def __init__(self, spec: QuantSpec, rows: int, length: int, scales_dtype: np.dtype):
        QuantSpec.__init__(self, spec.bits, spec.group_size, spec.mode)
        for name, value in (("rows", rows), ("length_", length), ("scales_dtype", np.dtype(scales_dtype).name)):
            object.__setattr__(self, name, value)

    @property
    def leaf_count(self) -> int:
        return 1

    def storage_shape(self, packed: Sequence[int]) -> tuple[int, ...]:
        return (*packed[:-2], self.rows, self.length_)

    def float_dtype(self, scales: np.dtype | type | None) -> np.dtype:
        return QuantSpec.float_dtype(self, jnp.dtype(self.scales_dtype))

    def __str__(self) -> str:
        return f"{QuantSpec.__str__(self)}@{self.held_by}"

    def __repr__(self) -> str:
        return f"ResidentSpec({QuantSpec.__repr__(self)}, {self.rows}, {self.length_}, {self.scales_dtype!r})"


class Residency:
    """Owns the data that MLX holds for one tree; made by `resident`. A context manager, whose value is the tree.

    Attributes:
      tree: the tree, its quantized weights replaced by resident ones.
      nbytes: bytes that MLX holds for it.
      closed: whether they were given back.
    """

    def __init__(self, tree: Any, numbers: Sequence[int], nbytes: int):
        self.tree = tree
        self.nbytes = nbytes
        # Refers to the numbers alone, so that it neither keeps this object alive nor needs it.
        self._release = weakref.finalize(self, mlx.drop, tuple(numbers))
        self._release.atexit = False

    @property
    def closed(self) -> bool:
        return not self._release.alive

    def close(self) -> None:
        """Give the memory back to MLX; a second call is harmless. Programs that use the tree from now on fail."""
        self._release()

    def __enter__(self) -> Any:
        if self.closed:
            raise ValueError("jaxq.resident: this residency is closed; call jaxq.resident again")
        return self.tree

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Residency({'closed' if self.closed else f'{self.nbytes} bytes in MLX'})"


def resident(tree: Any) -> Residency:
    """Let MLX hold the data of a tree's quantized weights, so that no call copies them.

        with jaxq.resident(params) as held:
            y = jax.jit(model)(held, x)

    A resident weight is a `QuantizedArray` of the same logical shape and dtype whose one leaf is a number per matrix.
    It works in `jax.jit`, `jax.vmap`, `jax.lax.scan` and derivatives with respect to x, wherever the implementation
    `mlx` does, and needs no `implementation=`; other implementations and platforms refuse it. Its data can't be read
    from JAX but by `dequantize`, and is not differentiated. On a Mac the data is in unified memory, where the GPU reads
    it. Scales and biases are held in float32: 8 bytes per group.

    The data lives as long as the object that is returned, until `close()` or the end of its `with` block: the tree
    alone does not keep it. Wait for results (`jax.block_until_ready`) before closing, since JAX computes behind the
    caller's back. A program that runs after that fails with an error that says so.

    Args:
      tree: any pytree with QuantizedArrays in it; its other leaves stay as they are. It may be deleted afterwards.

    Returns:
      A `Residency`.

    Raises:
      ValueError: mlx can't be used here; a tree without quantized weights; a weight, named by its path, that MLX has no
        format for, or that is resident already.
      TypeError: inside a traced function, where a weight has no data.
    """
    reason = mlx.unavailable()
    if reason is not None:
        raise ValueError(f"resident: {reason}")
    entries, treedef = tree_flatten_with_path(tree, is_leaf=is_quantized)
    if not any(is_quantized(leaf) for _, leaf in entries):
        raise ValueError("resident: the tree holds no QuantizedArray; quantize its weights first (jaxq.quantize)")
    for path, leaf in entries:
        if is_quantized(leaf):
            _check(keystr(path) or "the weight", leaf)

    leaves: list[Any] = []
    numbers: list[int] = []
    nbytes = 0
    try:
        for _, leaf in entries:
            if is_quantized(leaf):
                leaf, own, size = _load(leaf)
                numbers += own
                nbytes += size
            leaves.append(leaf)
    except BaseException:
        mlx.drop(numbers)
        raise
    return Residency(tree_unflatten(treedef, leaves), numbers, nbytes)


def _check(name: str, qw: QuantizedArray) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in qw.leaves):
        raise TypeError(f"resident: {name} is traced and has no data yet; call jaxq.resident outside jax.jit")
    if qw.spec.held_by is not None:
        raise ValueError(f"resident: {name} is resident already")
    reason = mlx.refuses("quantized_matmul", spec=qw.spec)
    if reason is not None:
        raise ValueError(f"resident: {name} is {qw.spec}: {reason}")


def _load(qw: QuantizedArray) -> tuple[QuantizedArray, list[int], int]:
    """The resident weight, its numbers and its bytes; each matrix of a stack on its own, so that `scan` can pick."""
    *lead, rows, length = qw.storage_shape
    matrices = [np.asarray(leaf).reshape(-1, *leaf.shape[-2:]) for leaf in qw.leaves]

    def load() -> tuple[list[int], int]:
        weights = [mlx.load(*arrays, spec=qw.spec) for arrays in zip(*matrices, strict=True)]
        return mlx.hold(weights), sum(weight.nbytes for weight in weights)

    numbers, nbytes = mlx.on_worker(load)
    spec = ResidentSpec(qw.spec, rows, length, qw.float_dtype)
    handle = jnp.asarray(np.asarray(numbers, np.uint32).reshape(*lead, 1, 1))
    return QuantizedArray(handle, spec=spec, axis=qw.axis), numbers, nbytes
