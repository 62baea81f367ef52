"""Sharding: constraints on weights, and `jax.shard_map` inside a dispatched function."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import primitives as p
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxq import _compat
from jaxq.dispatch.fallback import HELD, Policy, Unfused
from jaxq.dispatch.interpreter import evaluate, evaluate_traced, rule
from jaxq.dispatch.views import View, dense, flatten, is_view, unflatten


@rule(p.sharding_constraint_p)
def _sharding_constraint(eqn: Any, values: list[Any], policy: Policy) -> list[Any]:
    """The same constraint on the leaves, where the mesh leaves it to the compiler to follow it and they divide.

    On a mesh of explicit axes a constraint only asserts what the leaves' types say already.
    """
    (view,) = values
    sharding = eqn.params["sharding"]
    if not isinstance(sharding, NamedSharding) or view.held or set(sharding.mesh.axis_types) != {AxisType.Auto}:
        return [view]
    spec = _in_storage_order(view, sharding.spec)
    for axis in eqn.params["unconstrained_dims"]:
        spec[view.form.order[axis]] = PartitionSpec.UNCONSTRAINED
    if not _divides(view, spec, sharding.mesh):
        return [view]
    sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return [View([lax.with_sharding_constraint(leaf, sharding) for leaf in view.leaves], view.form)]


@rule("reshard")
def _reshard(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
    (view,) = values
    sharding = eqn.params["dst_sharding"]
    spec = _in_storage_order(view, sharding.spec)
    if view.held or not _divides(view, spec, sharding.mesh):
        return Unfused(HELD if view.held else f"{sharding.spec} cuts the grouped axis within a group or a word")
    sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return [View([jax.sharding.reshard(leaf, sharding) for leaf in view.leaves], view.form)]


@rule("pvary", "pcast")
def _pvary(eqn: Any, values: list[Any], policy: Policy) -> list[Any]:
    return [View([_compat.rebind(eqn, [leaf])[0] for leaf in values[0].leaves], values[0].form)]


@rule("shard_map", nested=True)
def _shard_map(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
    """Gone into by `jax.shard_map` over the leaves, partitioned as the weight is. What comes out is dense."""
    params = eqn.params
    mesh, in_specs, out_specs = params["mesh"], params["in_specs"], params["out_specs"]
    for value, spec in zip(values, in_specs, strict=True):
        if is_view(value) and value.held:
            return Unfused(HELD)
        if is_view(value) and not _divides(value, _in_storage_order(value, spec), mesh):
            return Unfused(f"{spec} cuts the grouped axis within a group or a word")

    def mapped(*values: Any) -> list[Any]:
        leaves, forms = flatten(values)
        specs: list[Any] = []
        for value, spec in zip(values, in_specs, strict=True):
            of_leaf = PartitionSpec(*_in_storage_order(value, spec)) if is_view(value) else spec
            specs.extend([of_leaf] * (len(value.leaves) if is_view(value) else 1))

        def body(*leaves: Any) -> tuple[Any, ...]:
            inner, consts = _compat.open_jaxpr(params["jaxpr"])
            return tuple(dense(out) for out in evaluate(inner, consts, unflatten(forms, leaves), policy))

        manual = params["newly_manual_axes"]
        options = dict(axis_names=set(manual), check_vma=params["check_vma"])
        return list(jax.shard_map(body, mesh=mesh, in_specs=tuple(specs), out_specs=out_specs, **options)(*leaves))

    key = ("shard_map", mesh, in_specs, out_specs, params["newly_manual_axes"], params["check_vma"])
    return evaluate_traced(params["jaxpr"], key, mapped, values, policy)


def _in_storage_order(view: View, spec: Iterable[Any]) -> list[Any]:
    """Per storage axis, by which mesh axes it is partitioned."""
    entries = list(spec)
    entries += [None] * (view.ndim - len(entries))
    return [entries[view.form.order.index(s)] for s in range(view.ndim)]


def _divides(view: View, spec: Sequence[Any], mesh: Any) -> bool:
    """Whether the parts of the grouped axis hold whole groups in whole words."""
    names = spec[-1]
    if names is None or names is PartitionSpec.UNCONSTRAINED:
        return True
    parts = math.prod(mesh.shape[name] for name in (names if isinstance(names, tuple) else (names,)))
    return view.storage_shape[-1] % (parts * view.form.spec.length_multiple) == 0
