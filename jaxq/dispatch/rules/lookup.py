"""Gathers: rows of an embedding, matrices of experts."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jaxq.dispatch.fallback import HELD, Policy, Unfused
from jaxq.dispatch.interpreter import rule
from jaxq.dispatch.views import View, is_view

# The byte that decodes to NaN: E8M0 in the microscaled formats of OCP, E4M3 in nvfp4.
_NAN_SCALE = {"mxfp4": 0xFF, "mxfp8": 0xFF, "nvfp4": 0x7F}


@rule(p.gather_p)
def _gather(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
    """Gathers that take the grouped axis whole. Rows come out dense, of those read alone; matrices stay quantized."""
    view, indices = values
    if not is_view(view) or is_view(indices):
        return Unfused("the weight serves as indices")
    if view.held:
        return Unfused(HELD)
    params = eqn.params
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    removed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    # Indices along the grouped axis do no harm where it is read whole: they mean the same for words and for groups.
    if view.grouped in removed or sizes[view.grouped] != view.shape[view.grouped]:
        return Unfused("it reads parts of groups; quantize along the axis that is read whole")
    fills = _fills(view, params)
    if fills is None:
        return Unfused(f"out-of-range entries are filled with {params['fill_value']}")

    storage_numbers = _in_storage_order(numbers, view)
    by_storage = [view.form.order.index(s) for s in range(view.ndim)]
    lead = [sizes[axis] for axis in by_storage[:-1]]
    gathered = [
        lax.gather(
            leaf,
            indices,
            storage_numbers,
            (*lead, leaf.shape[-1]),
            unique_indices=params["unique_indices"],
            indices_are_sorted=params["indices_are_sorted"],
            mode=params["mode"],
            fill_value=fill,
        )
        for leaf, fill in zip(view.leaves, fills, strict=True)
    ]
    # The result's offset axes come in storage order now, at the same places; the grouped one must be last.
    kept = [axis for axis in range(view.ndim) if axis not in removed]
    stored = sorted(view.form.order[axis] for axis in kept)
    place = {axis: numbers.offset_dims[stored.index(view.form.order[axis])] for axis in kept}
    grouped = numbers.offset_dims[-1]
    ndim = gathered[0].ndim
    position = {i: i - (i > grouped) if i != grouped else ndim - 1 for i in range(ndim)}
    order = list(range(ndim))
    for axis, out in zip(kept, numbers.offset_dims, strict=True):
        order[out] = place[axis]
    result = view.derive([jnp.moveaxis(g, grouped, -1) for g in gathered], order=tuple(position[i] for i in order))
    rows = all(sizes[axis] == 1 for axis in kept if axis != view.grouped)
    return [result.dense() if rows else result]


def _fills(view: View, params: dict[str, Any]) -> tuple[Any, ...] | None:
    """What each leaf of a row out of range holds, so that it dequantizes to the fill value; None where nothing does."""
    spec = view.form.spec
    if params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return (None,) * len(view.leaves)
    fill = params["fill_value"]
    fill = np.nan if fill is None else fill
    if spec.is_affine:
        return 0, 0, fill
    if np.isnan(fill):
        return 0, _NAN_SCALE[spec.mode]
    return (0, 0) if fill == 0 else None


def _in_storage_order(numbers: Any, view: View) -> lax.GatherDimensionNumbers:
    order = view.form.order
    batching = sorted(
        zip((order[d] for d in numbers.operand_batching_dims), numbers.start_indices_batching_dims, strict=True)
    )
    return lax.GatherDimensionNumbers(
        offset_dims=numbers.offset_dims,
        collapsed_slice_dims=tuple(sorted(order[d] for d in numbers.collapsed_slice_dims)),
        start_index_map=tuple(order[d] for d in numbers.start_index_map),
        operand_batching_dims=tuple(d for d, _ in batching),
        start_indices_batching_dims=tuple(d for _, d in batching),
    )
