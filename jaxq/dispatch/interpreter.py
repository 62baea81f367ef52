"""Evaluating a jaxpr whose values may be views: rules per primitive, and the cache of what was evaluated before."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax.extend.core import Literal, Primitive

from jaxq import _compat
from jaxq.dispatch.fallback import EXPLICIT, NAME_SCOPE, Policy, Unfused
from jaxq.dispatch.views import Form, View, dense, flatten, is_view, own, unflatten
from jaxq.primitives import common
from jaxq.primitives.dequantize import dequantize_p

# A rule gets the equation, its operands (arrays and views) and the policy, and returns its results, or `Unfused`.
Rule = Callable[[Any, list[Any], Policy], Sequence[Any] | Unfused]

RULES: dict[Primitive, Rule] = {}
# By name: primitives that no public module exports.
NAMED: dict[str, Rule] = {}
# The rules of equations with nested jaxprs, which apply too where only a nested jaxpr holds a weight.
NESTED: set[Rule] = set()
# The rules that take an element of a stack as such. The others get it copied out of the stack.
INDEXED: set[Rule] = set()

_NO_RULE = Unfused("there is no rule for it on a quantized weight")


def rule(*primitives: Primitive | str | None, nested: bool = False, indexed: bool = False) -> Callable[[Rule], Rule]:
    """Make the function the rule of some primitives, given as such or by name; None is skipped."""

    def register(function: Rule) -> Rule:
        for primitive in primitives:
            if isinstance(primitive, str):
                NAMED[primitive] = function
            elif primitive is not None:
                RULES[primitive] = function
        if nested:
            NESTED.add(function)
        if indexed:
            INDEXED.add(function)
        return function

    return register


def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], policy: Policy) -> list[Any]:
    """The results of an open jaxpr on arrays and views; arrays and views."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    # Values are dropped after their last use: outside jit they are arrays, and may be large.
    last_use = {atom: i for i, eqn in enumerate(jaxpr.eqns) for atom in eqn.invars if not isinstance(atom, Literal)}
    for atom in jaxpr.outvars:
        last_use.pop(atom, None) if not isinstance(atom, Literal) else None
    for i, eqn in enumerate(jaxpr.eqns):
        with _compat.equation_scope(eqn):
            outs = _evaluate_equation(eqn, [read(atom) for atom in eqn.invars], policy)
        env.update(zip(eqn.outvars, outs, strict=True))
        for atom in eqn.invars:
            if not isinstance(atom, Literal) and last_use.get(atom) == i:
                env.pop(atom, None)
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate_equation(eqn: Any, values: list[Any], policy: Policy) -> Sequence[Any]:
    primitive = eqn.primitive
    if primitive is dequantize_p:
        return [_dequantized(eqn, values, policy)]
    quantized = any(type(value) is View for value in values)
    function = RULES.get(primitive) or NAMED.get(primitive.name)
    if not quantized and not any(map(holds_weights, nested_jaxprs(eqn.params))):
        return _compat.rebind(eqn, values)
    if function not in INDEXED:
        values = [own(value) for value in values]
    applies = function is not None and (quantized or function in NESTED)
    outs = function(eqn, values, policy) if function and applies else _NO_RULE
    if not isinstance(outs, Unfused):
        return outs
    policy.report(eqn, [value for value in values if is_view(value)], outs.reason)
    return _compat.rebind(eqn, [dense(value) for value in values])


def _dequantized(eqn: Any, leaves: list[Any], policy: Policy) -> View:
    """The view that an equation `dequantize` makes: a weight from a closure, or what the code dequantizes itself."""
    name: str | None = EXPLICIT
    if policy.names_weights and NAME_SCOPE in (scope := str(eqn.source_info.name_stack)):
        name = scope.rpartition(NAME_SCOPE)[2].partition("/")[0].rstrip(")") or None
    return View(leaves, Form(eqn.params["spec"], tuple(range(leaves[0].ndim)), eqn.params["dtype"], None, name))


# ---- nested jaxprs


def nested_jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    found = []
    for value in params.values():
        if _compat.is_jaxpr(value):
            found.append(value)
        elif isinstance(value, tuple | list):
            found.extend(item for item in value if _compat.is_jaxpr(item))
    return found


_holds_weights: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def holds_weights(jaxpr: Any) -> bool:
    """Whether a jaxpr, or one nested in it, has an equation `dequantize`."""
    known = _holds_weights.get(jaxpr)
    if known is None:
        known = any(
            eqn.primitive is dequantize_p or any(map(holds_weights, nested_jaxprs(eqn.params)))
            for eqn in _compat.open_jaxpr(jaxpr)[0].eqns
        )
        _holds_weights[jaxpr] = known
    return known


# ---- the cache. A jaxpr that is evaluated again on views of the same form gives the very same new jaxpr, so that JAX's
# own caches, which go by identity, hold: nothing is compiled twice, and a layer that a model repeats is traced once.

_traced: weakref.WeakKeyDictionary[Any, dict[Hashable, tuple[Any, tuple[Form | None, ...]]]]
_traced = weakref.WeakKeyDictionary()


def traced(
    jaxpr: Any,
    key: Hashable,
    function: Callable[..., Sequence[Any]],
    values: Sequence[Any],
    policy: Policy,
) -> tuple[Any, tuple[Form | None, ...]]:
    """The jaxpr of `function(*values)`, flattened, and the forms of its results.

    Kept for as long as `jaxpr` lives, which the function is about; `key` holds what else it depends on. So neither
    the key nor what the function leaves in its jaxpr may refer to `jaxpr`.
    """
    leaves, forms = flatten(values)
    avals = tuple(leaf if isinstance(leaf, jax.core.ShapedArray) else jax.typeof(leaf) for leaf in leaves)
    full_key = (key, forms, avals, policy, common.current_implementation())
    kept = _traced.setdefault(jaxpr, {})
    if full_key not in kept:
        out_forms: list[tuple[Form | None, ...]] = []

        def flat(leaves: list[Any]) -> list[Any]:
            outs, forms_of_outs = flatten(function(*unflatten(forms, leaves)))
            out_forms.append(forms_of_outs)
            return outs

        new = jax.make_jaxpr(flat)(leaves)
        kept[full_key] = new, out_forms[-1]
    return kept[full_key]


def traced_body(jaxpr: Any, values: Sequence[Any], policy: Policy) -> tuple[Any, tuple[Form | None, ...]]:
    """`jaxpr` itself, evaluated on views: as a jaxpr on their leaves, and the forms of its results."""
    inner, consts = _compat.open_jaxpr(jaxpr)
    return traced(jaxpr, "body", lambda *args: evaluate(inner, consts, args, policy), values, policy)


def evaluate_traced(
    jaxpr: Any, key: Hashable, function: Callable[..., Sequence[Any]], values: Sequence[Any], policy: Policy
) -> list[Any]:
    """`function(*values)` by way of `traced`."""
    new, forms = traced(jaxpr, key, function, values, policy)
    inner, consts = _compat.open_jaxpr(new)
    return unflatten(forms, jax.core.eval_jaxpr(inner, consts, *flatten(values)[0]))


def evaluate_function(function: Callable[..., Sequence[Any]], values: Sequence[Any], policy: Policy) -> list[Any]:
    """A function of dense arrays, evaluated on views: traced, and its jaxpr evaluated."""
    avals = [value.aval if is_view(value) else value for value in values]
    inner, consts = _compat.open_jaxpr(jax.make_jaxpr(lambda args: list(function(*args)))(avals))
    return evaluate(inner, consts, values, policy)
