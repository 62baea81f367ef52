"""Operations that only look at a weight in another way: axes reordered, split, merged; dtypes; identities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jaxq.dispatch.fallback import HELD, Policy, Unfused
from jaxq.dispatch.interpreter import rule
from jaxq.dispatch.views import View, flatten, is_float, is_view, unflatten


@rule(p.transpose_p, indexed=True)
def _transpose(eqn: Any, values: list[Any], policy: Policy) -> list[Any]:
    return [values[0].transposed(eqn.params["permutation"])]


@rule(p.convert_element_type_p, indexed=True)
def _convert_element_type(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
    dtype = np.dtype(eqn.params["new_dtype"])
    if not is_float(dtype):
        return Unfused(f"{dtype.name} is no float dtype")
    return [values[0] if dtype == values[0].dtype else values[0].derive(dtype=dtype)]


@rule(p.stop_gradient_p, p.copy_p, p.name_p, p.reduce_precision_p, indexed=True)
def _identity(eqn: Any, values: list[Any], policy: Policy) -> list[Any]:
    # reduce_precision and a named weight (`checkpoint_name`) would only round or keep what is never made.
    return [values[0]]


@rule(lax.optimization_barrier_p)
def _optimization_barrier(eqn: Any, values: list[Any], policy: Policy) -> list[Any]:
    leaves, forms = flatten(values)
    return unflatten(forms, eqn.primitive.bind(*leaves))


@rule(p.device_put_p)
def _device_put(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
    if any(device is not None for device in eqn.params["devices"]):
        return Unfused("a weight is moved between devices outside of the dispatched function")
    return values


@rule(p.reshape_p, indexed=True)
def _reshape(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
    if eqn.params.get("dimensions") is not None:
        return Unfused("it reorders the axes as well")
    return reshaped(values[0], eqn.params["new_sizes"])


@rule(p.squeeze_p, indexed=True)
def _squeeze(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
    gone = {axis % values[0].ndim for axis in eqn.params["dimensions"]}
    return reshaped(values[0], [size for axis, size in enumerate(values[0].shape) if axis not in gone])


@rule(p.broadcast_in_dim_p, indexed=True)
def _broadcast_in_dim(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
    view, *dynamic = values
    shape, axes = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    kept = {axis: view.shape[i] for i, axis in enumerate(axes)} if is_view(view) else {}
    if dynamic or any(size != kept.get(axis, 1) for axis, size in enumerate(shape)):
        return Unfused("the weight is repeated along an axis")
    return reshaped(view, shape)


def reshaped(view: View, new: Sequence[int]) -> list[Any] | Unfused:
    """A view in another shape, where its storage can follow.

    The old and the new axes fall into runs of equal length: [H, D, O] to [H * D, O] are the runs (H, D) and (O). The
    storage axes of a run must be neighbours in the same order, and the run with the grouped axis must end in it, with
    whole groups in whole words. Axes of length 1 are nowhere in the way.
    """
    if view.held:
        return Unfused(HELD)
    runs = _runs(view.shape, new)
    if runs is None:
        return Unfused("the weight is empty")
    storage = view.storage_shape
    rank = {s: i for i, s in enumerate(s for s in range(view.ndim) if storage[s] != 1)}
    placed: list[tuple[int, list[int]]] = []
    for old_axes, new_axes in runs:
        ranks = [rank[view.form.order[axis]] for axis in old_axes]
        if ranks != list(range(ranks[0], ranks[0] + len(ranks))):
            return Unfused(f"reshaping {list(view.shape)} to {list(new)} merges axes that are not stored side by side")
        placed.append((ranks[0], new_axes))
    placed.sort()
    order = [axis for axis, size in enumerate(new) if size == 1]
    for _, new_axes in placed:
        order += new_axes
    last = new[order[-1]]
    if last % view.form.spec.length_multiple:
        return Unfused(
            f"reshaping {list(view.shape)} to {list(new)} splits the grouped axis into parts of {last}, which are not "
            f"whole groups of {view.form.spec.group_size}"
        )
    lead = [new[axis] for axis in order[:-1]]
    inverse = tuple(order.index(axis) for axis in range(len(new)))

    def reshape(leaf: Any, length: int) -> Any:
        shape = (*view.stack, *lead, length)
        return leaf if leaf.shape == shape else lax.reshape(leaf, shape)

    return [view.map_leaves(reshape, last, order=inverse)]


def _runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Pairs of the fewest consecutive old and new axes of the same total length, without the axes of length 1."""
    if math.prod(old) == 0:
        return None
    old_axes = [axis for axis, size in enumerate(old) if size != 1]
    new_axes = [axis for axis, size in enumerate(new) if size != 1]
    runs = []
    while old_axes:
        run_old, run_new = [old_axes.pop(0)], [new_axes.pop(0)]
        while (short := math.prod(old[a] for a in run_old)) != (long := math.prod(new[a] for a in run_new)):
            if short < long:
                run_old.append(old_axes.pop(0))
            else:
                run_new.append(new_axes.pop(0))
        runs.append((run_old, run_new))
    return runs
