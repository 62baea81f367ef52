"""`View`: a quantized weight while a jaxpr is evaluated, standing for the dense float array that was traced."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import _compat
from jaxq.array import QuantizedArray, storage_order
from jaxq.primitives import common
from jaxq.primitives.dequantize import bind_dequantize
from jaxq.primitives.quantized_matmul import element
from jaxq.spec import QuantSpec


class Form(NamedTuple):
    """What of a view is static. Hashable: part of the keys under which traced functions are kept.

    Attributes:
      spec: the format.
      order: for each axis of the view, which axis of the storage it is. The last storage axis is the grouped one.
      dtype: the float dtype that the traced function sees.
      axis: while the view is one of the function's own weights, unchanged but for transposition: the axes of the
        QuantizedArray that it is returned as. None once something was computed from it, which is returned dense.
      name: what to call the weight where it becomes dense; None where nobody asks.
      indexed: whether the view is one element of a stack. Its leaves are then those of the stack, which a product can
        read where they lie; `order` counts the axes of the element.
    """

    spec: QuantSpec
    order: tuple[int, ...]
    dtype: np.dtype
    axis: tuple[int, ...] | None = None
    name: str | None = None
    indexed: bool = False

    @property
    def leaf_count(self) -> int:
        """How many arrays stand for a view: the leaves, and the index of an element."""
        return self.spec.leaf_count + self.indexed

    @property
    def layout(self) -> tuple[Any, ...]:
        """What two views must share to be joined or to take each other's place."""
        return self.spec, self.order, self.dtype


class View:
    """A weight's leaves in storage order, and how the traced function sees them. Lives in one trace, never longer.

    Of an element of a stack, `index` holds int32[], which element it is; else it is empty.
    """

    __slots__ = ("_dense", "_own", "form", "index", "leaves")

    def __init__(self, arrays: Iterable[Any], form: Form):
        arrays = tuple(arrays)
        self.leaves, self.index = arrays[: form.spec.leaf_count], arrays[form.spec.leaf_count :]
        self.form = form
        self._dense: jax.Array | None = None
        self._own: View | None = None

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The leaves and the index, if there is one."""
        return (*self.leaves, *self.index)

    @property
    def ndim(self) -> int:
        return len(self.form.order)

    @property
    def storage_shape(self) -> tuple[int, ...]:
        return self.form.spec.storage_shape(self.leaves[0].shape)[len(self.index) :]

    @property
    def stack(self) -> tuple[int, ...]:
        """What the leaves' shapes have in front of the view's: the length of the stack, for an element of one."""
        return tuple(self.leaves[0].shape[: len(self.index)])

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.storage_shape
        return tuple(shape[i] for i in self.form.order)

    @property
    def dtype(self) -> np.dtype:
        return self.form.dtype

    @property
    def grouped(self) -> int:
        """Which axis of the view is the grouped one."""
        return self.form.order.index(self.ndim - 1)

    @property
    def held(self) -> bool:
        """Whether the data is outside JAX (see `jaxq.resident`), so that the leaves can't be cut or rearranged."""
        return self.form.spec.held_by is not None

    @property
    def aval(self) -> Any:
        """The abstract value of the dense array that the view stands for."""
        return _dense_aval(tuple([jax.typeof(leaf) for leaf in self.leaves]), self.form)

    def derive(self, leaves: Iterable[Any] | None = None, **changes: Any) -> View:
        """A view of something computed from this one."""
        arrays = self.arrays if leaves is None else (*leaves, *self.index)
        return View(arrays, self.form._replace(**{"axis": None, **changes}))

    def map_leaves(self, function: Callable[[Any, int], Any], last: int, **changes: Any) -> View:
        """A view of `function(leaf, length)`, where `length` is what `last` codes occupy of that leaf's last axis."""
        return self.derive([function(leaf, self.extent(i, last)) for i, leaf in enumerate(self.leaves)], **changes)

    def extent(self, leaf: int, codes: int) -> int:
        """How much of the last axis of leaf number `leaf` belongs to `codes` codes: words, or groups."""
        return self.form.spec.groups(codes) if leaf else self.form.spec.words(codes)

    def transposed(self, permutation: Sequence[int]) -> View:
        form = self.form
        axis = form.axis and tuple(permutation.index(a + self.ndim) - self.ndim for a in form.axis)
        return View(self.arrays, form._replace(order=tuple(form.order[i] for i in permutation), axis=axis))

    def own(self) -> View:
        """The same view over leaves that are no stack's: those of an element are copied out of it."""
        if not self.index:
            return self
        if self._own is None:
            self._own = View(element(self.leaves, *self.index), self.form._replace(indexed=False))
        return self._own

    def stored(self, lead: Sequence[int]) -> View:
        """The same view over leaves whose leading storage axes are permuted: `lead` are the old ones in new order."""
        if list(lead) == list(range(self.ndim - 1)):
            return self
        new = [*lead, self.ndim - 1]
        leaves = [lax.transpose(leaf, new) for leaf in self.own().leaves]
        return View(leaves, self.form._replace(order=tuple(new.index(i) for i in self.form.order), indexed=False))

    def dense(self) -> jax.Array:
        """The dense array, in the view's dtype."""
        if self._dense is None:
            spec, order, dtype = self.form.spec, self.form.order, self.dtype
            name = common.resolve_implementation("dispatch", None, "dequantize", spec)
            direct = dtype if dtype in common.FLOAT_DTYPES else np.dtype(np.float32)
            w = bind_dequantize(*self.own().leaves, spec=spec, dtype=direct, implementation=name)
            w = w if order == tuple(range(w.ndim)) else lax.transpose(w, order)
            self._dense = w if direct == dtype else w.astype(dtype)
        return self._dense

    def as_quantized(self) -> QuantizedArray:
        """A QuantizedArray of the view's shape; moves packed words only if its axes can't be named otherwise."""
        view, n = self.own(), self.ndim
        axis = self.form.axis or (self.grouped - n,)
        if storage_order(n, axis) != self.form.order:
            lead = [self.form.order[i] for i in range(n) if i != self.grouped]
            view, axis = self.stored(lead), (self.grouped - n,)
        return QuantizedArray(*view.leaves, spec=view.form.spec, axis=axis)

    def result(self) -> QuantizedArray | jax.Array:
        """What the dispatched function returns for this view."""
        return self.dense() if self.form.axis is None else self.as_quantized()


@functools.lru_cache(maxsize=1024)
def _dense_aval(avals: tuple[Any, ...], form: Form) -> Any:
    # Kept, since a model has few shapes of weights and many weights.
    partition = _compat.partition(avals[0])[form.indexed :]
    shape = form.spec.storage_shape(avals[0].shape)[form.indexed :]
    return _compat.result_aval(avals, [shape[i] for i in form.order], form.dtype, [partition[i] for i in form.order])


def view_of(qw: QuantizedArray, dtype: Any = None, name: str | None = None) -> View:
    """The view of a complete QuantizedArray; `dtype` is that of the float array it is to look like."""
    dtype = qw.float_dtype if dtype is None else np.dtype(dtype)
    return View(qw.leaves, Form(qw.spec, storage_order(qw.ndim, qw.axis), dtype, qw.axis, name))


def is_view(value: Any) -> bool:
    return type(value) is View


def dense(value: Any) -> Any:
    """A view as a dense array; anything else as it is."""
    return value.dense() if type(value) is View else value


def own(value: Any) -> Any:
    """A view over leaves that are no stack's; anything else as it is."""
    return value.own() if type(value) is View else value


def size(value: Any) -> int:
    return math.prod(value.shape)


def is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


# ---- lists of values as flat lists of arrays, for the operands and results of nested jaxprs


def flatten(values: Sequence[Any]) -> tuple[list[Any], tuple[Form | None, ...]]:
    """The arrays of a list of values, and per value its form: None where it is an array."""
    leaves: list[Any] = []
    forms: list[Form | None] = []
    for value in values:
        if type(value) is View:
            leaves.extend(value.arrays)
            forms.append(value.form)
        else:
            leaves.append(value)
            forms.append(None)
    return leaves, tuple(forms)


def unflatten(forms: Sequence[Form | None], leaves: Sequence[Any]) -> list[Any]:
    """The inverse of `flatten`."""
    source = iter(leaves)
    return [
        next(source) if form is None else View([next(source) for _ in range(form.leaf_count)], form) for form in forms
    ]


def per_leaf(items: Sequence[Any], forms: Sequence[Form | None], filler: Any) -> tuple[Any, ...]:
    """A list with an item per value as one with an item per array; the leaves of views get `filler`."""
    out: list[Any] = []
    for item, form in zip(items, forms, strict=True):
        out.extend([item] if form is None else [filler] * form.leaf_count)
    return tuple(out)
