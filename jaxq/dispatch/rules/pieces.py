"""Cutting weights into pieces and joining them: slices, splits, stacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from jaxq.dispatch.fallback import HELD, Policy, Unfused
from jaxq.dispatch.interpreter import rule
from jaxq.dispatch.views import View, is_view


@rule(p.slice_p)
def _slice(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
    view = values[0]
    if view.held:
        return Unfused(HELD)
    by_storage = [view.form.order.index(s) for s in range(view.ndim)]
    strides = eqn.params["strides"] or (1,) * view.ndim
    start, limit, stride = (
        [params[axis] for axis in by_storage]
        for params in (eqn.params["start_indices"], eqn.params["limit_indices"], strides)
    )
    full = (start[-1], limit[-1], stride[-1]) == (0, view.storage_shape[-1], 1)
    multiple = view.form.spec.length_multiple
    if not full and (stride[-1] != 1 or start[-1] % multiple or limit[-1] % multiple):
        return Unfused(
            f"[{start[-1]}:{limit[-1]}:{stride[-1]}] of the grouped axis is not made of whole groups of "
            f"{view.form.spec.group_size}"
        )
    leaves = [
        lax.slice(leaf, [*start[:-1], view.extent(i, start[-1])], [*limit[:-1], view.extent(i, limit[-1])], stride)
        for i, leaf in enumerate(view.leaves)
    ]
    return [row_or_view(view, view.derive(leaves))]


@rule(p.dynamic_slice_p)
def _dynamic_slice(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
    view, *starts = values
    if view.held:
        return Unfused(HELD)
    by_storage = [view.form.order.index(s) for s in range(view.ndim)]
    sizes = [eqn.params["slice_sizes"][axis] for axis in by_storage]
    if sizes[-1] != view.storage_shape[-1]:
        return Unfused("it takes a part of the grouped axis that is known only as it runs")
    start = [starts[axis] for axis in by_storage]
    start[-1] = jnp.zeros((), start[-1].dtype)
    cut = view.map_leaves(lambda leaf, length: lax.dynamic_slice(leaf, start, [*sizes[:-1], length]), sizes[-1])
    return [row_or_view(view, cut)]


def row_or_view(whole: View, cut: View) -> Any:
    """What a look-up gives: rows of a matrix are activations, and so dense at once; a matrix of a stack stays a view.

    No weight becomes dense thereby: only what was read.
    """
    is_row = all(size == 1 for size in cut.storage_shape[:-1]) and whole.storage_shape != cut.storage_shape
    return cut.dense() if is_row else cut


@rule(lax.split_p)
def _split(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
    view, sizes = values[0], eqn.params["sizes"]
    if view.held:
        return Unfused(HELD)
    axis = view.form.order[eqn.params["axis"]]
    grouped = axis == view.ndim - 1
    if grouped and any(size % view.form.spec.length_multiple for size in sizes):
        return Unfused(f"parts of {list(sizes)} are not whole groups of {view.form.spec.group_size}")
    parts = []
    for i, leaf in enumerate(view.leaves):
        here = [view.extent(i, size) for size in sizes] if grouped else sizes
        parts.append(lax.split(leaf, here, axis))
    return [view.derive(leaves) for leaves in zip(*parts, strict=True)]


@rule(lax.unstack_p)
def _unstack(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
    view = values[0]
    if view.held:
        return Unfused(HELD)
    position = eqn.params["axis"]
    axis = view.form.order[position]
    if axis == view.ndim - 1:
        return Unfused("it takes the grouped axis apart")
    order = tuple(s - (s > axis) for i, s in enumerate(view.form.order) if i != position)
    parts = zip(*(lax.unstack_p.bind(leaf, axis=axis) for leaf in view.leaves), strict=True)
    rows = view.ndim == 2
    views = [view.derive(leaves, order=order) for leaves in parts]
    return [part.dense() if rows else part for part in views]


@rule(p.concatenate_p)
def _concatenate(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
    if not alike(values):
        return Unfused("it joins weights that are not all quantized in the same format and layout")
    axis = values[0].form.order[eqn.params["dimension"]]
    return [values[0].derive([lax.concatenate(leaves, axis) for leaves in _columns(values)])]


@rule(lax.stack_p)
def _stack(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
    if not alike(values):
        return Unfused("it joins weights that are not all quantized in the same format and layout")
    order = [s + 1 for s in values[0].form.order]
    order.insert(eqn.params["axis"], 0)
    return [values[0].derive([jnp.stack(leaves) for leaves in _columns(values)], order=tuple(order))]


def alike(values: Sequence[Any]) -> bool:
    """Whether all values are views that can stand in one storage."""
    return all(is_view(value) and not value.held for value in values) and all(
        value.form.layout == values[0].form.layout and value.leaves[1].dtype == values[0].leaves[1].dtype
        for value in values
    )


def _columns(views: Sequence[View]) -> list[tuple[Any, ...]]:
    return list(zip(*(view.leaves for view in views), strict=True))
