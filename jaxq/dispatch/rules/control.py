"""Equations with nested jaxprs: the interpreter goes into them, and hands the weights on in quantized form."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import primitives as p

from jaxq import _compat
from jaxq.dispatch.fallback import HELD, Policy
from jaxq.dispatch.interpreter import evaluate, evaluate_traced, rule, traced_body
from jaxq.dispatch.views import Form, View, dense, flatten, is_view, per_leaf, unflatten
from jaxq.primitives.quantized_matmul import quantized_matmul_p, split


@rule(p.jit_p, nested=True)
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


@rule(p.closed_call_p, p.call_p, nested=True)
def _call(eqn: Any, values: list[Any], policy: Policy) -> list[Any]:
    inner, consts = _compat.open_jaxpr(eqn.params["call_jaxpr"])
    return evaluate(inner, consts, values, policy)


@rule(p.remat_p, nested=True)
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


@rule(p.scan_p, nested=True)
def _scan(eqn: Any, values: list[Any], policy: Policy) -> list[Any]:
    params = eqn.params
    const_at, carry_at, xs_at = _compat.scan_operands(params, len(values))
    consts, carry, xs = ([values[i] for i in which] for which in (const_at, carry_at, xs_at))
    xs = [_scannable(eqn, value, policy) for value in xs]
    jaxpr = params["jaxpr"]
    positions = [*const_at, *carry_at, *xs_at]

    def body(consts: Sequence[Any], carry: Sequence[Any], slices: Sequence[Any]) -> list[Any]:
        args = dict(zip(positions, (*consts, *carry, *slices), strict=True))
        inner, own = _compat.open_jaxpr(jaxpr)
        return evaluate(inner, own, [args[i] for i in range(len(args))], policy)

    if any(map(is_view, carry)):
        carry = _steady_carry(jaxpr, [*consts, *carry, *map(_first, xs)], positions, len(consts), len(carry), policy)

    def scan(*values: Any) -> list[Any]:
        consts, carry, xs = _split(values, len(const_at), len(carry_at))
        const_leaves, const_forms = flatten(consts)
        carry_leaves, carry_forms = flatten(carry)
        xs_leaves, xs_forms = flatten(xs)
        slice_forms = [form and _slice_form(form) for form in xs_forms]
        y_forms: list[Form | None] = []

        def step(carry_leaves: Any, slices: Any) -> Any:
            outs = body(
                unflatten(const_forms, const_leaves),
                unflatten(carry_forms, carry_leaves),
                unflatten(slice_forms, slices),
            )
            new_carry, ys = outs[: len(carry)], outs[len(carry) :]
            new_carry = [new if form else dense(new) for new, form in zip(new_carry, carry_forms, strict=True)]
            y_leaves, y_forms[:] = flatten(ys)
            return flatten(new_carry)[0], y_leaves

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        carry_leaves, y_leaves = lax.scan(step, carry_leaves, xs_leaves, **options)
        stacked = [form and _stacked_form(form) for form in y_forms]
        return [*unflatten(carry_forms, carry_leaves), *unflatten(stacked, y_leaves)]

    key = ("scan", params["length"], params["reverse"], params["unroll"])
    return evaluate_traced(jaxpr, key, scan, [*consts, *carry, *xs], policy)


def _split(values: Sequence[Any], first: int, second: int) -> tuple[list[Any], list[Any], list[Any]]:
    return list(values[:first]), list(values[first : first + second]), list(values[first + second :])


def _scannable(eqn: Any, value: Any, policy: Policy) -> Any:
    """A scanned operand; a view with its first axis first in storage too, so that the scan slices its leaves."""
    if not is_view(value):
        return value
    first = value.form.order[0]
    if first == value.ndim - 1 or (value.held and first != 0):
        policy.report(eqn, [value], HELD if value.held else "it is scanned over its grouped axis")
        return value.dense()
    return value.stored([first, *(s for s in range(value.ndim - 1) if s != first)])


def _slice_form(form: Form) -> Form:
    """The form of one element of a stack whose first axis is first in storage."""
    return form._replace(order=tuple(s - 1 for s in form.order[1:]))


def _stacked_form(form: Form) -> Form:
    return form._replace(order=(0, *(s + 1 for s in form.order)))


def _first(value: Any) -> Any:
    """What a scan's body gets of a scanned operand, as abstract values."""
    if is_view(value):
        return View([_first(leaf) for leaf in value.leaves], _slice_form(value.form))
    aval = jax.typeof(value)
    return _compat.result_aval([aval], aval.shape[1:], aval.dtype, _compat.partition(aval)[1:])


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


@rule(p.while_p, nested=True)
def _while(eqn: Any, values: list[Any], policy: Policy) -> list[Any]:
    params = eqn.params
    cond_jaxpr, body_jaxpr = params["cond_jaxpr"], params["body_jaxpr"]
    cond_count, body_count = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, carry = _split(values, cond_count, body_count)
    if any(map(is_view, carry)):
        positions = list(range(body_count + len(carry)))
        carry = _steady_carry(body_jaxpr, [*body_consts, *carry], positions, body_count, len(carry), policy)

    def loop(*values: Any) -> list[Any]:
        cond_consts, body_consts, carry = _split(values, cond_count, body_count)
        cond_leaves, cond_forms = flatten(cond_consts)
        body_leaves, body_forms = flatten(body_consts)
        carry_leaves, carry_forms = flatten(carry)

        def run(jaxpr: Any, forms: Any, leaves: Any, carry_leaves: Any) -> list[Any]:
            inner, own = _compat.open_jaxpr(jaxpr)
            return evaluate(inner, own, [*unflatten(forms, leaves), *unflatten(carry_forms, carry_leaves)], policy)

        def body(carry_leaves: Any) -> Any:
            new = run(body_jaxpr, body_forms, body_leaves, carry_leaves)
            return flatten([n if form else dense(n) for n, form in zip(new, carry_forms, strict=True)])[0]

        def cond(carry_leaves: Any) -> Any:
            return run(cond_jaxpr, cond_forms, cond_leaves, carry_leaves)[0]

        return unflatten(carry_forms, lax.while_loop(cond, body, carry_leaves))

    key = ("while", weakref.ref(cond_jaxpr), cond_count, body_count)
    return evaluate_traced(body_jaxpr, key, loop, [*cond_consts, *body_consts, *carry], policy)


@rule(p.cond_p, nested=True)
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
                outs = evaluate(inner, consts, unflatten(forms, leaves), policy)
                return flatten([out if form else dense(out) for out, form in zip(outs, keep, strict=True)])[0]

            return run

        return unflatten(keep, lax.switch(index, [taken(branch) for branch in branches], *leaves))

    key = ("cond", tuple(weakref.ref(branch) for branch in branches[1:]))
    return evaluate_traced(branches[0], key, switch, values, policy)


def _common_form(forms: Sequence[Form | None]) -> Form | None:
    first = forms[0]
    if first is None or any(form is None or form.layout != first.layout for form in forms):
        return None
    same_axis = all(form is not None and form.axis == first.axis for form in forms)
    return first if same_axis else first._replace(axis=None)
