"""Rules for primitives of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn, Primitive

from jaxq.array import QuantizedArray
from jaxq.dispatch.fallback import Policy, Unfused
from jaxq.dispatch.interpreter import RULES
from jaxq.dispatch.views import is_view, view_of

UserRule = Callable[[JaxprEqn, Sequence[Any]], Any]


def register_dispatch_rule(primitive: Primitive) -> Callable[[UserRule], UserRule]:
    """Say what `jaxq.dispatch` does with a primitive of yours that meets a quantized weight. A decorator.

    The function gets the equation and its operands, of which at least one is a `QuantizedArray`; the others are
    arrays. A QuantizedArray has the logical shape of the equation's operand, `eqn.invars[i].aval`, whose dtype is
    the float dtype that the traced code saw. It returns the results, a sequence for a primitive of several, of the
    shapes and dtypes of `eqn.outvars`; those may be QuantizedArrays too. Or `NotImplemented`: then the weights become
    dense, as they do without a rule. It wins over a rule of jaxq's own for the same primitive; the last one counts.

        @jaxq.register_dispatch_rule(my_matmul_p)
        def _(eqn, operands):
            x, w = operands
            if not jaxq.is_quantized(w) or jaxq.is_quantized(x):
                return NotImplemented
            return jaxq.quantized_matmul(x, w, transpose=w.axis == (-1,))

    Raises:
      TypeError: for a primitive that is none.
    """
    if not isinstance(primitive, Primitive):
        raise TypeError(
            f"register_dispatch_rule: primitive={primitive!r} is a {type(primitive).__name__}; "
            "pass a jax.extend.core.Primitive"
        )

    def register(function: UserRule) -> UserRule:
        def run(eqn: Any, values: list[Any], policy: Policy) -> list[Any] | Unfused:
            outs = function(eqn, [value.as_quantized() if is_view(value) else value for value in values])
            if outs is NotImplemented:
                return Unfused("the rule registered for it does not cover this case")
            outs = list(outs) if eqn.primitive.multiple_results else [outs]
            if len(outs) != len(eqn.outvars):
                raise ValueError(
                    f"dispatch: the rule registered for {primitive.name} returned {len(outs)} results; "
                    f"its equation has {len(eqn.outvars)}"
                )
            return [_checked(primitive, out, var.aval) for out, var in zip(outs, eqn.outvars, strict=True)]

        RULES[primitive] = run
        return function

    return register


def _checked(primitive: Primitive, out: Any, aval: Any) -> Any:
    found = view_of(out, aval.dtype) if isinstance(out, QuantizedArray) else out
    kind = found if is_view(found) else jax.typeof(found)
    if tuple(kind.shape) != tuple(aval.shape) or kind.dtype != aval.dtype:
        raise ValueError(
            f"dispatch: the rule registered for {primitive.name} returned {kind.dtype}{list(kind.shape)}; "
            f"its equation gives {aval.str_short()}"
        )
    return found.derive() if is_view(found) else found
