"""`QuantizedArray`: a quantized weight as a pytree that looks like the dense array it stands for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey

from jaxq.spec import Mode, QuantSpec

if TYPE_CHECKING:
    from jaxq.indexing import Index

_HELP = (
    "a jaxq.QuantizedArray is no jax.Array: use `x @ qw`, jaxq.quantized_matmul(x, qw), "
    "wrap the function in jaxq.dispatch, or call qw.dequantize()"
)


# What `__jax_array__` is: absent, unless `jaxq.dispatch`, which nothing here may import, is tracing a function.
_placeholder: Callable[[QuantizedArray], Callable[[], jax.Array] | None] | None = None


def set_placeholder(placeholder: Callable[[QuantizedArray], Callable[[], jax.Array] | None]) -> None:
    """Register what `QuantizedArray.__jax_array__` is: a function of the array, which gives None for "absent"."""
    global _placeholder
    _placeholder = placeholder


class _Helpful(type):
    """JAX's type errors print the class of a bad operand, so the class's own repr can say what to do instead."""

    def __repr__(cls) -> str:
        return f"<class '{cls.__module__}.{cls.__qualname__}'> ({_HELP})"


@jax.tree_util.register_pytree_with_keys_class
class QuantizedArray(metaclass=_Helpful):
    """A weight in groups of quantized codes.

    A pytree with the leaves `packed`, `scales` and, in mode affine, `biases`. They are in storage order: the axes of
    `axis` last, the last of them packed and grouped. `shape`, `dtype` and `ndim` are those of the dense weight, and
    follow from the leaves, so that `jax.vmap` and `jax.lax.scan` can slice leading axes (and only those: an `in_axes`
    counts storage axes). Made by `jaxq.quantize`, or by `from_packed` from a checkpoint's arrays. Immutable; compares
    by identity.

    Attributes:
      packed: uint32[..., N, K * bits / 32], codes as `jaxq.packing` lays them out.
      scales: float[..., N, K / group_size]; in the float modes uint8, E8M0 (mxfp4, mxfp8) or E4M3 (nvfp4) bytes.
      biases: like scales; None in the float modes. In a resident weight `packed` is a handle, and both are None.
      spec: the format, a `QuantSpec`.
      axis: the logical axes that are grouped and contracted, as negative ints; (-1,) for [out, in].
    """

    __slots__ = ("__weakref__", "axis", "biases", "packed", "scales", "spec")

    packed: Any
    scales: Any
    biases: Any
    spec: QuantSpec
    axis: tuple[int, ...]

    # np.ndarray @ qw must come to __rmatmul__.
    __array_ufunc__ = None

    def __init__(
        self, packed: Any, scales: Any = None, biases: Any = None, *, spec: QuantSpec, axis: int | Sequence[int] = -1
    ):
        """From leaves in storage order, unchecked; `from_packed` checks."""
        axis = (axis,) if isinstance(axis, int) else tuple(axis)
        for name, value in (("packed", packed), ("scales", scales), ("biases", biases), ("spec", spec), ("axis", axis)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"QuantizedArray: {name} can't be set; a QuantizedArray is immutable")

    @classmethod
    def from_packed(
        cls,
        packed: Any,
        scales: Any,
        biases: Any = None,
        *,
        bits: int,
        group_size: int,
        mode: Mode = "affine",
        axis: int | Sequence[int] = -1,
    ) -> Self:
        """From a checkpoint's arrays, checked against each other and not copied.

        Args:
          packed: uint32[..., N, K * bits / 32].
          scales: float32, float16 or bfloat16 [..., N, K / group_size]; uint8 in the float modes.
          biases: as scales; None in the float modes.
          bits, group_size, mode: the format; see `QuantSpec`.
          axis: which logical axis (or axes) the stored last one (or ones) is.

        Raises:
          ValueError: an illegal format, shapes that contradict each other, biases missing or out of place.
          TypeError: a wrong dtype.
        """
        spec = QuantSpec(bits, group_size, mode)
        _check_leaves("from_packed", packed, scales, biases, spec)
        return cls(packed, scales, biases, spec=spec, axis=normalize_axis("from_packed", axis, packed.ndim))

    # ---- pytree. Nothing is checked here: JAX puts placeholders of every kind through it.

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[GetAttrKey, Any], ...], tuple[QuantSpec, tuple[int, ...]]]:
        names = ("packed", "scales", "biases")
        return tuple((GetAttrKey(name), getattr(self, name)) for name in names), (self.spec, self.axis)

    def tree_flatten(self) -> tuple[tuple[Any, Any, Any], tuple[QuantSpec, tuple[int, ...]]]:
        return (self.packed, self.scales, self.biases), (self.spec, self.axis)

    @classmethod
    def tree_unflatten(cls, aux: tuple[QuantSpec, tuple[int, ...]], children: Sequence[Any]) -> Self:
        self = object.__new__(cls)
        for name, value in zip(("packed", "scales", "biases", "spec", "axis"), (*children, *aux), strict=True):
            object.__setattr__(self, name, value)
        return self

    def __reduce__(self) -> Any:
        return _unpickle, (type(self), (self.spec, self.axis), (self.packed, self.scales, self.biases))

    # ---- what it is

    @property
    def leaves(self) -> tuple[Any, ...]:
        """packed, scales and, in mode affine, biases."""
        return (self.packed, self.scales, self.biases)[: self.spec.leaf_count]

    @property
    def storage_shape(self) -> tuple[int, ...]:
        """The logical shape in storage order, the grouped axis last."""
        return self.spec.storage_shape(self.packed.shape)  # AttributeError where a placeholder stands for the leaf

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense weight."""
        shape = self.storage_shape
        return tuple(shape[i] for i in storage_order(len(shape), self.axis))

    @property
    def dtype(self) -> np.dtype:
        """int2, int4, int8, float4_e2m1fn or float8_e4m3fn: what a code is, not what `dequantize` gives."""
        return self.spec.dtype

    @property
    def float_dtype(self) -> np.dtype:
        """What `dequantize` gives by default: the dtype of the scales, bfloat16 in the float modes."""
        return self.spec.float_dtype(getattr(self.scales, "dtype", None))

    @property
    def ndim(self) -> int:
        return len(self.packed.shape)

    @property
    def size(self) -> int:
        """How many weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the leaves occupy."""
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in self.leaves)

    @property
    def bits(self) -> int:
        return self.spec.bits

    @property
    def group_size(self) -> int:
        return self.spec.group_size

    @property
    def mode(self) -> str:
        return self.spec.mode

    @property
    def sharding(self) -> Any:
        """The sharding of `packed`, in storage order."""
        return self.packed.sharding

    def __repr__(self) -> str:
        axis = "" if self.axis == (-1,) else f", axis={self.axis[0] if len(self.axis) == 1 else self.axis}"
        try:
            what = f"{self.dtype.name}[{', '.join(map(str, self.shape))}], {self.nbytes} bytes"
            what += f", data in {self.spec.held_by}" if self.spec.held_by else ""
        except (AttributeError, TypeError, ValueError):
            what = f"packed={self.packed!r}, scales={self.scales!r}, biases={self.biases!r}"
        return f"QuantizedArray({what}, bits={self.bits}, group_size={self.group_size}, mode={self.mode!r}{axis})"

    # ---- views

    @property
    def T(self) -> Self:
        """The transpose of a matrix; moves no data."""
        if self.ndim != 2:
            raise ValueError(f"QuantizedArray.T: shape={self.shape} is of rank {self.ndim}; use .mT for stacks")
        return self.mT

    @property
    def mT(self) -> Self:
        """The last two axes swapped; moves no data."""
        if len(self.axis) != 1 or self.axis[0] not in (-1, -2):
            raise ValueError(f"QuantizedArray.mT: axis={self.axis} is not among the last two alone")
        return type(self)(self.packed, self.scales, self.biases, spec=self.spec, axis=(-3 - self.axis[0],))

    def swapaxes(self, axis1: int, axis2: int) -> Self:
        """Like `jnp.swapaxes`, for the last two axes."""
        pair = {axis + self.ndim if axis < 0 else axis for axis in (axis1, axis2)}
        if pair == {self.ndim - 1, self.ndim - 2}:
            return self.mT
        if len(pair) == 1 and pair <= set(range(self.ndim)):
            return self
        raise ValueError(f"QuantizedArray.swapaxes: axes {axis1} and {axis2} are not the last two of {self.ndim}")

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[QuantizedArray | jax.Array]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Index) -> QuantizedArray | jax.Array:
        """NumPy indexing of every axis but the grouped one.

        Slices and leading axes give a QuantizedArray; an int or an array of ints on the axis of rows, the last one
        that is not grouped, gives dense rows, of those read alone: the look-up of an embedding.
        """
        from jaxq.indexing import getitem

        return getitem(self, index)

    def take(self, ids: Any, dtype: Any = None) -> jax.Array:
        """Dense rows: `self[ids]`, computed in float32 and rounded once to a dtype of the caller's.

        `ids`: an int, or ints of any shape, along the axis of rows, the last one that is not grouped. `dtype` None is
        that of the scales. Raises IndexError as indexing does; TypeError for what is no int or no floating dtype.
        """
        from jaxq.indexing import take

        return take(self, ids, dtype)

    # ---- arithmetic

    def dequantize(self, dtype: Any = None, *, implementation: str | None = None) -> jax.Array:
        """The dense weight; see `jaxq.dequantize`."""
        from jaxq.primitives.dequantize import dequantize

        return dequantize(self, dtype, implementation=implementation)

    def astype(self, dtype: Any) -> jax.Array:
        """The dense weight in a float dtype; see `jaxq.dequantize`."""
        return self.dequantize(dtype)

    def __rmatmul__(self, x: Any) -> jax.Array:
        from jaxq.primitives.quantized_matmul import quantized_matmul

        if self.ndim < 2 or self.axis not in ((-1,), (-2,)):
            raise ValueError(f"QuantizedArray: x @ qw needs axis -1 or -2, not {self.axis}; use jaxq.dispatch")
        return quantized_matmul(x, self, transpose=self.axis == (-2,))

    def __matmul__(self, x: Any) -> jax.Array:
        if isinstance(x, QuantizedArray):
            raise TypeError("QuantizedArray: both operands of @ are quantized; call .dequantize() on one of them")
        x = jnp.asarray(x)
        if x.ndim < 2:
            return x @ self.mT
        return jnp.swapaxes(jnp.swapaxes(x, -1, -2) @ self.mT, -1, -2)

    @property
    def __jax_array__(self) -> Callable[[], jax.Array]:
        # JAX calls this before it tries __rmatmul__, so it must be absent unless jaxq.dispatch stages the function.
        convert = _convert(self)
        if convert is None:
            raise AttributeError("__jax_array__")
        return convert

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NoReturn:
        raise TypeError(f"QuantizedArray: no implicit conversion to a dense array; {_HELP}")

    def __getattr__(self, name: str) -> Any:
        # Called where nothing of that name is defined here: a method of arrays, while jaxq.dispatch traces.
        convert = None if name.startswith("__") else _convert(self)
        if convert is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}; {_HELP}")
        return getattr(convert(), name)


def _convert(qw: QuantizedArray) -> Callable[[], jax.Array] | None:
    return None if _placeholder is None else _placeholder(qw)


def _arithmetic(name: str) -> Callable[..., Any]:
    def operator(self: QuantizedArray, *operands: Any) -> Any:
        convert = _convert(self)
        if convert is None:
            raise TypeError(f"QuantizedArray: only matrix products are defined on quantized weights; {_HELP}")
        return getattr(convert(), name)(*operands)

    return operator


for _name in ("add", "sub", "mul", "truediv", "pow", "mod", "floordiv"):
    setattr(QuantizedArray, f"__{_name}__", _arithmetic(f"__{_name}__"))
    setattr(QuantizedArray, f"__r{_name}__", _arithmetic(f"__r{_name}__"))
for _name in ("lt", "le", "gt", "ge", "neg", "pos", "abs", "float", "int"):
    setattr(QuantizedArray, f"__{_name}__", _arithmetic(f"__{_name}__"))


def is_quantized(x: Any) -> bool:
    """Whether x is a QuantizedArray; of use as `is_leaf` in `jax.tree.map`."""
    return isinstance(x, QuantizedArray)


def _unpickle(cls: type[QuantizedArray], aux: Any, children: Any) -> QuantizedArray:
    return cls.tree_unflatten(aux, children)


# ---- axes. Storage order is the logical order with the axes of `axis` moved to the end.


@functools.cache
def storage_order(ndim: int, axis: tuple[int, ...]) -> tuple[int, ...]:
    """For each logical axis, which storage axis it is: `logical = storage.transpose(storage_order(...))`."""
    last = [a % ndim for a in axis]
    order = [a for a in range(ndim) if a not in last] + last
    return tuple(order.index(a) for a in range(ndim))


def to_storage(w: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    """A dense array from logical to storage order."""
    order = [int(a) for a in np.argsort(storage_order(w.ndim, axis))]
    return w if order == list(range(w.ndim)) else jnp.transpose(w, order)


def from_storage(w: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    """A dense array from storage to logical order."""
    order = storage_order(w.ndim, axis)
    return w if list(order) == list(range(w.ndim)) else jnp.transpose(w, order)


def normalize_axis(function: str, axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """`axis` as a tuple of negative ints, distinct and in range; fewer than `ndim`."""
    given = (axis,) if isinstance(axis, int | np.integer) else tuple(axis)
    axes = tuple(int(a) - ndim if a >= 0 else int(a) for a in given)
    if not axes or len(set(axes)) != len(axes) or not all(-ndim <= a < 0 for a in axes) or len(axes) >= ndim:
        raise ValueError(
            f"{function}: axis={axis} is not legal for rank {ndim}; pick one axis, or several distinct ones, and leave "
            "at least one that is not grouped"
        )
    return axes


# ---- checks


def check_complete(function: str, qw: QuantizedArray) -> None:
    """Raise TypeError where a leaf is no array, as in a tree that something else than JAX has filled."""
    for name, leaf in zip(("packed", "scales", "biases"), qw.leaves, strict=False):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"{function}: {name} of the quantized weight is a {type(leaf).__name__}, not an array")


def _check_leaves(function: str, packed: Any, scales: Any, biases: Any, spec: QuantSpec) -> None:
    for name, leaf in (("packed", packed), ("scales", scales), *((("biases", biases),) if biases is not None else ())):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"{function}: {name} is a {type(leaf).__name__}; pass an array")
    if np.dtype(packed.dtype) != np.uint32:
        raise TypeError(f"{function}: packed.dtype={np.dtype(packed.dtype).name}; it must be uint32")
    if len(packed.shape) < 2:
        raise ValueError(f"{function}: packed.shape={packed.shape} is of rank {len(packed.shape)}; 2 or more is needed")
    if spec.is_affine != (biases is not None):
        need = "needs biases" if spec.is_affine else "has no biases; pass None"
        raise ValueError(
            f"{function}: biases={'None' if biases is None else 'an array'}, but mode {spec.mode!r} {need}"
        )
    allowed = ("float32", "float16", "bfloat16") if spec.is_affine else ("uint8",)
    if np.dtype(scales.dtype).name not in allowed:
        raise TypeError(f"{function}: scales.dtype={np.dtype(scales.dtype).name}; it must be {' or '.join(allowed)}")
    *lead, words = packed.shape
    length = spec.length(words)
    if spec.words(length) != words or length % spec.length_multiple:
        raise ValueError(
            f"{function}: packed.shape[-1]={words} words hold {words * 32 / spec.bits:g} codes of {spec.bits} bits, "
            f"which is no multiple of {spec.length_multiple} (packed.shape={tuple(packed.shape)}, {spec!r})"
        )
    expected = (*lead, spec.groups(length))
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"{function}: scales.shape={tuple(scales.shape)}; packed.shape={tuple(packed.shape)} with {spec!r} needs "
            f"{expected}"
        )
    if biases is not None and (tuple(biases.shape) != expected or biases.dtype != scales.dtype):
        raise ValueError(
            f"{function}: biases are {np.dtype(biases.dtype).name}{list(biases.shape)}; they must match the scales, "
            f"{np.dtype(scales.dtype).name}{list(expected)}"
        )
