"""Products with a weight: the reason for all the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jaxq import _compat
from jaxq.dispatch.fallback import HELD, Policy, Unfused
from jaxq.dispatch.interpreter import rule
from jaxq.dispatch.rules.layout import reshaped
from jaxq.dispatch.views import View, is_view, size
from jaxq.primitives import common
from jaxq.primitives.quantized_matmul import bind_quantized_matmul


@rule(p.dot_general_p, indexed=True)
def _dot_general(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    lhs, rhs = values
    if eqn.params.get("out_sharding") is not None:
        return Unfused("it asks for a sharding of its result")
    if is_view(lhs) and is_view(rhs):
        smaller = min((lhs, rhs), key=size)
        policy.report(eqn, [smaller], "both operands are quantized weights")
        lhs, rhs = (lhs.dense(), rhs) if smaller is lhs else (lhs, rhs.dense())
    swapped = is_view(lhs)
    if swapped:
        view, x, axes = lhs, rhs, _Axes(rhs_contract, lhs_contract, rhs_batch, lhs_batch)
    else:
        view, x, axes = rhs, lhs, _Axes(lhs_contract, rhs_contract, lhs_batch, rhs_batch)
    return _product(x, view, axes, swapped, eqn.outvars[0].aval.dtype)


class _Axes(NamedTuple):
    """The contracted and the batch axes of a dot, of the dense operand x and of the weight w."""

    x_contract: Sequence[int]
    w_contract: Sequence[int]
    x_batch: Sequence[int]
    w_batch: Sequence[int]


def _product(x: Any, view: View, axes: _Axes, swapped: bool, dtype: np.dtype) -> list[Any] | Unfused:
    """A dot of x with a weight. Its result has the batch axes, then x's free ones, then w's; `swapped`: w's before x's.

    The primitive contracts x's last axis with the weight's last or last but one, and takes batch axes first; here
    the others are brought to that. Of the weight only packed words move, and in the usual layouts not even those.
    """
    if (refused := _refused_operand(x, axes.x_contract, dtype)) is not None:
        return refused
    order, storage = view.form.order, view.storage_shape
    contract = [order[a] for a in axes.w_contract]
    batch = [order[a] for a in axes.w_batch]
    last = view.ndim - 1
    if last in batch:
        return Unfused("the grouped axis is a batch axis of it")
    if not contract:
        return Unfused("it is an outer product")
    free = [a for a in range(view.ndim) if a not in axes.w_contract and a not in axes.w_batch]
    w_free = sorted(order[a] for a in free)
    by_storage = sorted(range(len(contract)), key=contract.__getitem__)
    transpose = last in contract
    rows, columns = (w_free, sorted(contract)) if transpose else (sorted(contract), w_free)
    if view.held and (rows != [last - 1] or columns != [last]):
        return Unfused(HELD)
    weight = _matrix(view, batch, rows, columns)

    x_free = [a for a in range(x.ndim) if a not in axes.x_contract and a not in axes.x_batch]
    x = _permuted(x, [*axes.x_batch, *x_free, *(axes.x_contract[i] for i in by_storage)])
    lead = x.shape[: x.ndim - len(contract)]
    if len(contract) > 1:
        x = lax.reshape(x, (*lead, math.prod(x.shape[len(lead) :])))
    y = _bind(x, weight, view, transpose, dtype)
    if len(w_free) != 1:
        y = lax.reshape(y, (*lead, *(storage[s] for s in w_free)))
    w_places = [len(lead) + w_free.index(order[a]) for a in free]
    x_places = list(range(len(batch), len(lead)))
    return [_permuted(y, [*range(len(batch)), *(w_places + x_places if swapped else x_places + w_places)])]


def _refused_operand(x: Any, contract: Sequence[int], dtype: np.dtype) -> Unfused | None:
    """Why x can't be multiplied fused, if it can't."""
    if x.dtype not in common.FLOAT_DTYPES or dtype not in common.FLOAT_DTYPES:
        return Unfused(f"{x.dtype.name} in and {dtype.name} out is not among float32, float16 and bfloat16")
    if any(_compat.partition(jax.typeof(x))[axis] is not None for axis in contract):
        return Unfused("the contracted axis is partitioned over an explicit mesh")
    return None


def _matrix(view: View, batch: list[int], rows: list[int], columns: list[int]) -> list[Any]:
    """The leaves as [B..., N, W]: storage axes permuted to batch, rows, columns, and the latter two merged each.

    After them the index of an element of a stack, unless its axes are permuted: for that it is copied out.
    """
    storage = view.storage_shape
    order = [*batch, *rows, *columns]
    if order != sorted(order):
        view = view.own()
    lead = [*(storage[s] for s in batch), math.prod(storage[s] for s in rows)]
    codes = math.prod(storage[s] for s in columns)

    def arrange(leaf: Any, length: int) -> Any:
        leaf = leaf if view.index else _permuted(leaf, order)
        return leaf if len(rows) == len(columns) == 1 else lax.reshape(leaf, (*view.stack, *lead, length))

    return [*(arrange(leaf, view.extent(i, codes)) for i, leaf in enumerate(view.leaves)), *view.index]


def _bind(x: Any, weight: list[Any], view: View, transpose: bool, dtype: np.dtype) -> Any:
    """The quantized product in `dtype`, computed in the wider of that and x's dtype, rounded from there."""
    spec = view.form.spec
    name = common.resolve_implementation("dispatch", None, "quantized_matmul", spec)
    wide = dtype if x.dtype == dtype else np.dtype(np.float32)
    x = x if x.dtype == wide else lax.convert_element_type(x, wide)
    y = bind_quantized_matmul(x, *weight, spec=spec, transpose=transpose, implementation=name)
    return y if wide == dtype else lax.convert_element_type(y, dtype)


def _permuted(x: Any, order: list[int]) -> Any:
    return x if order == list(range(x.ndim)) else lax.transpose(x, order)


@rule(p.conv_general_dilated_p, indexed=True)
def _conv_general_dilated(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
    """A convolution with windows of one element: a product with x's features, at every stride-th place."""
    x, view = values
    params = eqn.params
    numbers = params["dimension_numbers"]
    if not is_view(view) or is_view(x):
        return Unfused("the weight is convolved, and not the kernel")
    window = [view.shape[axis] for axis in numbers.rhs_spec[2:]]
    padding = [pad for pair in params["padding"] for pad in pair]
    groups = params["feature_group_count"], params["batch_group_count"]
    if any(size != 1 for size in (*window, *params["lhs_dilation"], *groups)) or any(padding):
        return Unfused(f"only convolutions with windows of 1 and neither padding nor groups are fused, not {window}")
    kernel = reshaped(view.transposed(numbers.rhs_spec), [view.shape[axis] for axis in numbers.rhs_spec[:2]])
    if isinstance(kernel, Unfused):
        return kernel
    stride = dict(zip(numbers.lhs_spec[2:], params["window_strides"], strict=True))
    if any(step != 1 for step in stride.values()):
        x = lax.slice(x, [0] * x.ndim, x.shape, [stride.get(axis, 1) for axis in range(x.ndim)])
    feature = numbers.lhs_spec[1]
    outs = _product(x, kernel[0], _Axes([feature], [1], (), ()), False, eqn.outvars[0].aval.dtype)
    if isinstance(outs, Unfused):
        return outs
    kept = [axis for axis in range(x.ndim) if axis != feature]
    place = {axis: kept.index(axis) for axis in kept} | {feature: len(kept)}
    order = [0] * x.ndim
    for of_x, of_out in zip(numbers.lhs_spec, numbers.out_spec, strict=True):
        order[of_out] = place[of_x]
    return [_permuted(outs[0], order)]


@rule("ragged_dot_general", "ragged_dot", indexed=True)
def _ragged_dot(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
    """Experts: rows of x in consecutive groups, each times its own matrix, one after the other in a loop.

    So the largest thing that is made is the result, and an expert without rows costs nothing: it is not even read.
    """
    x, view, sizes, *_ = values
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_contract, w_contract), (x_batch, w_batch) = numbers.dot_dimension_numbers
    dtype = eqn.outvars[0].aval.dtype
    if not is_view(view) or is_view(x):
        return Unfused("only its second operand, the experts' matrices, can be quantized")
    plain = list(numbers.rhs_group_dimensions) == [0] and list(numbers.lhs_ragged_dimensions) == [0]
    if not plain or x_batch or w_batch or x.ndim != 2 or view.ndim != 3 or sizes.ndim != 1 or 0 in x_contract:
        return Unfused("only x[M, K] with experts [E, K, N] is fused")
    if eqn.params.get("group_offset") is not None or eqn.params.get("out_sharding") is not None or len(values) > 3:
        return Unfused("it has a group offset or asks for a sharding of its result")
    if view.form.order[0] == view.ndim - 1:
        return Unfused("the experts' axis is the grouped one")
    if view.held and view.form.order[0] != 0:
        return Unfused(HELD)
    if (refused := _refused_operand(x, x_contract, dtype)) is not None:
        return refused
    view = view.stored([view.form.order[0], *(s for s in range(2) if s != view.form.order[0])])
    experts = view.storage_shape[0]
    stack, first = view.leaves, jnp.int32(0)
    if view.index:  # an element of a stack of layers: its experts are some of all the layers' experts
        stack = tuple(lax.collapse(leaf, 0, 2) for leaf in stack)
        first = view.index[0] * experts
    expert = view.form._replace(order=tuple(s - 1 for s in view.form.order[1:]), axis=None, indexed=True)
    axes = _Axes(x_contract, [a - 1 for a in w_contract], (), ())
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    row = lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
    columns = next(view.shape[a] for a in (1, 2) if a not in w_contract)

    def step(y: Any, expert_of: Any) -> tuple[Any, None]:
        start, end, index = expert_of

        def multiply() -> Any:
            product = _product(x, View([*stack, index], expert), axes, False, dtype)
            assert not isinstance(product, Unfused)  # what it refuses was refused above
            return jnp.where((row >= start) & (row < end), product[0], y)

        return lax.cond(end > start, multiply, lambda: y), None

    zeros = jnp.zeros((x.shape[0], columns), dtype)
    steps = first + jnp.arange(experts, dtype=jnp.int32)
    y, _ = lax.scan(step, zeros, (ends - sizes.astype(jnp.int32), ends, steps))
    return [y]
