"""Equations with nested jaxprs: the interpreter goes into them, and hands the weights on in quantized form."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from jaxq import _compat
from jaxq.dispatch.fallback import HELD, Policy
from jaxq.dispatch.interpreter import evaluate, evaluate_traced, rule, traced_body
from jaxq.dispatch.views import Form, View, dense, flatten, is_view, own, per_leaf, unflatten
from jaxq.primitives.quantized_matmul import quantized_matmul_p, split


@rule(p.jit_p, nested=True, indexed=True)
def _jit(eqn: Any, values: list[Any], policy: Policy) -> list[Any]:
    leaves, forms = flatten(values)
    params = dict(eqn.params)
    params["jaxpr"], out_forms = traced_body(params["jaxpr"], values, policy)
    unspecified = _compat.unspecified_sharding()
    for name, which, filler in (
        ("in_shardings", forms, unspecified),
        ("in_layouts", forms, None),
        ("donated_invars", forms, False),
        ("out_shardings", out_forms, unspecified),
        ("out_layouts", out_forms, None),
    ):
        if name in params:
            params[name] = per_leaf(params[name], which, filler)
    return unflatten(out_forms, eqn.primitive.bind(*leaves, **params))


@rule(p.closed_call_p, p.call_p, nested=True, indexed=True)
def _call(eqn: Any, values: list[Any], policy: Policy) -> list[Any]:
    inner, consts = _compat.open_jaxpr(eqn.params["call_jaxpr"])
    return evaluate(inner, consts, values, policy)


@rule(p.remat_p, nested=True, indexed=True)
def _remat(eqn: Any, values: list[Any], policy: Policy) -> list[Any]:
    # Bound as it is and not by `jax.checkpoint`, which would forget that the equation was differentiated already.
    new, out_forms = traced_body(eqn.params["jaxpr"], values, policy)
    inner, consts = _compat.constants_to_operands(new)
    params = {**eqn.params, "jaxpr": inner, "policy": _remat_policy(eqn.params.get("policy"))}
    return unflatten(out_forms, eqn.primitive.bind(*consts, *flatten(values)[0], **params))


@functools.lru_cache(maxsize=256)
def _remat_policy(policy: Any) -> Any:
    """A policy that sees a quantized product as the dot that it stands for, so `dots_saveable` saves it."""
    if not callable(policy):
        return policy

    def wrapped(primitive: Any, *avals: Any, **params: Any) -> Any:
        if primitive is not quantized_matmul_p:
            return policy(primitive, *avals, **params)
        x, (packed, *_), index = split(avals, params["spec"])
        if index:
            partition = _compat.partition(packed)[1:]
            packed = _compat.result_aval([packed], packed.shape[1:], packed.dtype, partition)
        batch = tuple(range(packed.ndim - 2))
        contracted = packed.ndim - 1 if params["transpose"] else packed.ndim - 2
        numbers = (((x.ndim - 1,), (contracted,)), (batch, batch))
        return policy(p.dot_general_p, x, packed, dimension_numbers=numbers)

    return wrapped


@rule(p.scan_p, nested=True, indexed=True)
def _scan(eqn: Any, values: list[Any], policy: Policy) -> list[Any]:
    """Scanned weights stay outside: the body gets each as an element of a stack, and multiplies by it where it lies."""
    params = eqn.params
    const_at, carry_at, xs_at = _compat.scan_operands(params, len(values))
    consts, carry, xs = ([values[i] for i in which] for which in (const_at, carry_at, xs_at))
    xs = [_scannable(eqn, value, policy) for value in xs]
    jaxpr = params["jaxpr"]
    positions = [*const_at, *carry_at, *xs_at]

    def body(consts: Sequence[Any], carry: Sequence[Any], slices: Sequence[Any]) -> list[Any]:
        args = dict(zip(positions, (*consts, *carry, *slices), strict=True))
        inner, held = _compat.open_jaxpr(jaxpr)
        return evaluate(inner, held, [args[i] for i in range(len(args))], policy)

    carry = [own(value) for value in carry]
    if any(map(is_view, carry)):
        carry = _steady_carry(jaxpr, [*consts, *carry, *map(_element, xs)], positions, len(consts), len(carry), policy)

    def scan(*values: Any) -> list[Any]:
        consts, carry, xs = _split(values, len(const_at), len(carry_at))
        const_leaves, const_forms = flatten(consts)
        carry_leaves, carry_forms = flatten(carry)
        y_forms: list[Form | None] = []

        def step(carry_leaves: Any, slices: Any) -> Any:
            index, arrays = slices[0], iter(slices[1:])
            outs = body(
                unflatten(const_forms, const_leaves),
                unflatten(carry_forms, carry_leaves),
                [_element(x, index) if is_view(x) else next(arrays) for x in xs],
            )
            new_carry, ys = outs[: len(carry)], outs[len(carry) :]
            y_leaves, y_forms[:] = flatten([own(y) for y in ys])
            return _carried(new_carry, carry_forms), y_leaves

        steps = jnp.arange(params["length"], dtype=jnp.int32) if any(map(is_view, xs)) else None
        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        scanned = [steps, *(x for x in xs if not is_view(x))]
        carry_leaves, y_leaves = lax.scan(step, carry_leaves, scanned, **options)
        stacked = [form and _stacked_form(form) for form in y_forms]
        return [*unflatten(carry_forms, carry_leaves), *unflatten(stacked, y_leaves)]

    key = ("scan", params["length"], params["reverse"], params["unroll"])
    return evaluate_traced(jaxpr, key, scan, [*consts, *carry, *xs], policy)


def _split(values: Sequence[Any], first: int, second: int) -> tuple[list[Any], list[Any], list[Any]]:
    return list(values[:first]), list(values[first : first + second]), list(values[first + second :])


def _scannable(eqn: Any, value: Any, policy: Policy) -> Any:
    """A scanned operand; a view with its first axis first in storage too, so that it is a stack of its elements."""
    if not is_view(value):
        return value
    first = value.form.order[0]
    if first == value.ndim - 1 or (value.held and first != 0):
        policy.report(eqn, [value], HELD if value.held else "it is scanned over its grouped axis")
        return value.dense()
    return value.stored([first, *(s for s in range(value.ndim - 1) if s != first)]).own()


_ANY_INDEX = jax.core.ShapedArray((), jnp.int32)


def _element(stack: Any, index: Any = _ANY_INDEX) -> Any:
    """What a scan's body gets of a scanned operand: of a view an element; of an array its abstract value."""
    if is_view(stack):
        order = tuple(s - 1 for s in stack.form.order[1:])
        return View([*stack.leaves, index], stack.form._replace(order=order, indexed=True))
    aval = jax.typeof(stack)
    return _compat.result_aval([aval], aval.shape[1:], aval.dtype, _compat.partition(aval)[1:])


def _stacked_form(form: Form) -> Form:
    return form._replace(order=(0, *(s + 1 for s in form.order)))


def _carried(values: Sequence[Any], forms: Sequence[Form | None]) -> list[Any]:
    """The leaves of what a body gives, in the forms that the loop, or the branches, agree on."""
    return flatten([own(value) if form else dense(value) for value, form in zip(values, forms, strict=True)])[0]


def _steady_carry(
    jaxpr: Any, values: list[Any], positions: list[int], consts: int, carries: int, policy: Policy
) -> list[Any]:
    """The carries of a loop, with those dense that the body changes: the largest set that may stay quantized."""
    while True:
        args = dict(zip(positions, values, strict=True))
        _, out_forms = traced_body(jaxpr, [args[i] for i in range(len(args))], policy)
        changed = [
            i
            for i, (value, form) in enumerate(zip(values[consts : consts + carries], out_forms, strict=False))
            if is_view(value) and (form is None or form.layout != value.form.layout)
        ]
        if not changed:
            return values[consts : consts + carries]
        for i in changed:
            values[consts + i] = values[consts + i].dense()


@rule(p.while_p, nested=True, indexed=True)
def _while(eqn: Any, values: list[Any], policy: Policy) -> list[Any]:
    params = eqn.params
    cond_jaxpr, body_jaxpr = params["cond_jaxpr"], params["body_jaxpr"]
    cond_count, body_count = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, carry = _split(values, cond_count, body_count)
    carry = [own(value) for value in carry]
    if any(map(is_view, carry)):
        positions = list(range(body_count + len(carry)))
        carry = _steady_carry(body_jaxpr, [*body_consts, *carry], positions, body_count, len(carry), policy)

    def loop(*values: Any) -> list[Any]:
        cond_consts, body_consts, carry = _split(values, cond_count, body_count)
        cond_leaves, cond_forms = flatten(cond_consts)
        body_leaves, body_forms = flatten(body_consts)
        carry_leaves, carry_forms = flatten(carry)

        def run(jaxpr: Any, forms: Any, leaves: Any, carry_leaves: Any) -> list[Any]:
            inner, held = _compat.open_jaxpr(jaxpr)
            return evaluate(inner, held, [*unflatten(forms, leaves), *unflatten(carry_forms, carry_leaves)], policy)

        def body(carry_leaves: Any) -> Any:
            return _carried(run(body_jaxpr, body_forms, body_leaves, carry_leaves), carry_forms)

        def cond(carry_leaves: Any) -> Any:
            return run(cond_jaxpr, cond_forms, cond_leaves, carry_leaves)[0]

        return unflatten(carry_forms, lax.while_loop(cond, body, carry_leaves))

    key = ("while", weakref.ref(cond_jaxpr), cond_count, body_count)
    return evaluate_traced(body_jaxpr, key, loop, [*cond_consts, *body_consts, *carry], policy)


@rule(p.cond_p, nested=True, indexed=True)
def _cond(eqn: Any, values: list[Any], policy: Policy) -> list[Any]:
    branches = eqn.params["branches"]
    results = [traced_body(branch, values[1:], policy)[1] for branch in branches]
    # A result stays quantized where every branch gives it in the same layout.
    keep = [_common_form(forms) for forms in zip(*results, strict=True)]

    def switch(index: Any, *operands: Any) -> list[Any]:
        leaves, forms = flatten(operands)

        def taken(branch: Any) -> Callable[..., Any]:
            inner, consts = _compat.open_jaxpr(branch)

            def run(*leaves: Any) -> list[Any]:
                return _carried(evaluate(inner, consts, unflatten(forms, leaves), policy), keep)

            return run

        return unflatten(keep, lax.switch(index, [taken(branch) for branch in branches], *leaves))

    key = ("cond", tuple(weakref.ref(branch) for branch in branches[1:]))
    return evaluate_traced(branches[0], key, switch, values, policy)


def _common_form(forms: Sequence[Form | None]) -> Form | None:
    first = forms[0]
    if first is None or any(form is None or form.layout != first.layout for form in forms):
        return None
    same_axis = all(form is not None and form.axis == first.axis for form in forms)
    return first._replace(axis=first.axis if same_axis else None, indexed=False)
