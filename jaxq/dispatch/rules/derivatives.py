"""Functions with derivative rules of their own: what they compute runs fused, their rules are kept, and run fused too.

The rules are reached through `jax.jvp` and `jax.vjp` of the original equation, traced with dense arrays in the place
of the weights and evaluated like everything else. Nothing here goes through the cache of traced functions: the rules
refer to the equation, which would keep its own key alive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import primitives as p
from jax.tree_util import Partial

from jaxq import _compat
from jaxq.dispatch.fallback import Policy
from jaxq.dispatch.interpreter import evaluate, evaluate_function, rule
from jaxq.dispatch.views import Form, View, dense, flatten, is_float, is_view, unflatten
from jaxq.primitives.dequantize import weight_cotangents


@rule(p.custom_jvp_call_p, nested=True)
def _custom_jvp_call(eqn: Any, values: list[Any], policy: Policy) -> list[Any]:
    leaves, forms = flatten(values)

    @jax.custom_jvp
    def call(*leaves: Any) -> list[Any]:
        return _primal(eqn, unflatten(forms, leaves), policy)

    def derivative(leaves: Sequence[Any], leaf_tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        primals = unflatten(forms, leaves)
        tangents = _tangents(primals, forms, leaf_tangents)
        moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

        def jvp(*args: Any) -> list[Any]:
            primals, tangents = args[: len(forms)], args[len(forms) :]
            function = _function_of(eqn, primals, moving)
            outs, out_tangents = jax.jvp(function, tuple(primals[i] for i in moving), tuple(tangents))
            return [*outs, *out_tangents]

        outs = evaluate_function(jvp, [*primals, *(tangents[i] for i in moving)], policy)
        outs = [dense(out) for out in outs]
        half = len(outs) // 2
        return outs[:half], outs[half:]

    call.defjvp(derivative, symbolic_zeros=True)
    return list(call(*leaves))


@rule(p.custom_vjp_call_p, nested=True)
def _custom_vjp_call(eqn: Any, values: list[Any], policy: Policy) -> list[Any]:
    leaves, forms = flatten(values)

    @jax.custom_vjp
    def call(*leaves: Any) -> list[Any]:
        return _primal(eqn, unflatten(forms, leaves), policy)

    def forward(*primals: Any) -> tuple[list[Any], Partial]:
        views = unflatten(forms, [primal.value for primal in primals])
        perturbed = unflatten(forms, [primal.perturbed for primal in primals])
        moving = [i for i, p in enumerate(perturbed) if (any(p.leaves[1:]) if is_view(p) else p)]
        count, tree = 0, None

        def vjp(*args: Any) -> list[Any]:
            nonlocal count, tree
            outs, pullback = jax.vjp(_function_of(eqn, args, moving), *(args[i] for i in moving))
            residuals, tree = jax.tree.flatten(pullback)
            count = len(outs)
            return [*outs, *residuals]

        results = evaluate_function(vjp, views, policy)
        residuals, residual_forms = flatten(results[count:])
        pull = functools.partial(_pull, tree, residual_forms, forms, moving, policy)
        moving_leaves = [views[i].leaves if is_view(views[i]) else None for i in moving]
        # A Partial: its function, with all that is no array, passes between the two as a static part of a pytree.
        return [dense(out) for out in results[:count]], Partial(pull, residuals, moving_leaves)

    call.defvjp(forward, lambda pull, cotangents: pull(cotangents), symbolic_zeros=True)
    return list(call(*leaves))


def _pull(
    tree: Any,
    residual_forms: Sequence[Form | None],
    forms: Sequence[Form | None],
    moving: Sequence[int],
    policy: Policy,
    residuals: list[Any],
    moving_leaves: list[Any],
    cotangents: Sequence[Any],
) -> tuple[Any, ...]:
    """The cotangents of all leaves, None for zero, from those of the results."""
    zero = [type(cotangent) is SymbolicZero for cotangent in cotangents]
    cotangents = [jnp.zeros(ct.shape, ct.dtype) if z else ct for ct, z in zip(cotangents, zero, strict=True)]
    count = len(residual_forms)

    def pull(*args: Any) -> list[Any]:
        return list(jax.tree.unflatten(tree, args[:count])(list(args[count:])))

    values = [*unflatten(residual_forms, residuals), *cotangents]
    results = dict(zip(moving, map(dense, evaluate_function(pull, values, policy)), strict=True))
    leaves = dict(zip(moving, moving_leaves, strict=True))
    out: list[Any] = []
    for i, form in enumerate(forms):
        if form is None:
            out.append(results.get(i))
        elif i not in results:
            out.extend([None] * form.spec.leaf_count)
        else:
            packed, *params = leaves[i]
            stored = lax.transpose(results[i], np.argsort(form.order))
            out.extend([None, *weight_cotangents(stored, packed, [leaf.dtype for leaf in params], form.spec)])
    return tuple(out)


def _primal(eqn: Any, values: Sequence[Any], policy: Policy) -> list[Any]:
    inner, consts = _compat.open_jaxpr(eqn.params["call_jaxpr"])
    return [dense(out) for out in evaluate(inner, consts, values, policy)]


def _function_of(eqn: Any, args: Sequence[Any], moving: Sequence[int]) -> Callable[..., list[Any]]:
    """The equation as a function of those of its operands that carry derivatives."""

    def function(*some: Any) -> list[Any]:
        operands = list(args)
        for i, operand in zip(moving, some, strict=True):
            operands[i] = operand
        return _compat.rebind(eqn, operands)

    return function


def _tangents(primals: Sequence[Any], forms: Sequence[Form | None], leaves: Sequence[Any]) -> list[Any]:
    """Per value its tangent, None where it is zero. That of a weight is a view too: linear in scales and biases."""
    source = iter(leaves)
    tangents: list[Any] = []
    for primal, form in zip(primals, forms, strict=True):
        if form is None:
            tangent = next(source)
            tangents.append(None if type(tangent) is SymbolicZero else tangent)
            continue
        _, *of_params = [next(source) for _ in range(form.spec.leaf_count)]
        if all(type(tangent) is SymbolicZero or not is_float(tangent.dtype) for tangent in of_params):
            tangents.append(None)
            continue
        params = [
            jnp.zeros_like(param) if type(tangent) is SymbolicZero else tangent
            for param, tangent in zip(primal.leaves[1:], of_params, strict=True)
        ]
        tangents.append(View([primal.leaves[0], *params], form._replace(axis=None)))
    return tangents
