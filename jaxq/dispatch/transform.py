"""`dispatch`: a function traced with float arrays for its quantized weights, and what it did evaluated with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import _compat
from jaxq.array import QuantizedArray, is_quantized
from jaxq.dispatch import captures
from jaxq.dispatch.fallback import Fallback, Policy
from jaxq.dispatch.interpreter import evaluate
from jaxq.dispatch.staging import is_absent, is_complete, staging
from jaxq.dispatch.views import is_view, view_of
from jaxq.primitives import common

F = TypeVar("F", bound=Callable[..., Any])


def dispatch(f: F, *, dtype: Any = None, fallback: Fallback = "dequantize") -> F:
    """Make the dots in `f` that meet a quantized weight run as quantized products; no call site changes.

    Inside `f` each `QuantizedArray` among its arguments is a float array of the weight's logical shape, a tracer: all
    of JAX works on it (and jaxq's own operations, which would take it as an array, aren't needed). `f` is traced so,
    and what it did is evaluated with the quantized weights: a dot becomes `quantized_matmul`, a look-up of rows
    dequantizes those rows, transposes, reshapes, slices, stacks and casts act on the packed data, and `jit`, `scan`,
    `while`, `cond`, `checkpoint`, `custom_jvp`, `custom_vjp` and `shard_map` are gone into. A `scan` over a stack of
    weights multiplies by each where it lies (see `quantized_matmul`'s `index`). Where there is no rule, the weight
    becomes dense there, and `fallback` says whether that is told. A weight that `f` returns unchanged or transposed is
    returned as a QuantizedArray.

    Weights that `f` does not take as arguments count as well: those in the closure, the globals and the defaults of
    a Python function, in a callable pytree (an `eqx.Module`, `jax.tree_util.Partial`), in a `functools.partial`; and
    any other QuantizedArray that meets an operator, or a function of `jax.numpy`, while `f` is traced.

    Composes with the transformations of JAX, in either order. It does not compile: wrap it, `jax.jit(dispatch(f))`,
    which then costs nothing as it runs. `dispatch(jax.jit(f))` compiles once as well, but traces `f`'s outer part at
    each call. As under `jax.jit`, values in `f` are tracers, and its control flow can't depend on them. A
    `use_implementation` belongs around the call, not inside `f`.

    Gradients reach the scales and biases of a weight by `jax.grad(dispatch(f))`. Inside `f` a weight that came as an
    argument, or was captured, is a float array: it has no `scales` to replace, and a derivative is that of the dense
    weight. So put trained scales into a weight before it goes in, `dispatch(f)(QuantizedArray(packed, scales, biases,
    spec=spec), x)`, or hand in the three arrays and make the weight of them inside; that is differentiated anywhere.

    Args:
      f: any function of pytrees. Arguments that are neither JAX arrays nor QuantizedArrays pass through as they are.
      dtype: float32, float16 or bfloat16: the dtype that weights show inside `f`; by default that of their scales
        (bfloat16 in the float modes). It decides type promotion: float32 scales make bfloat16 activations float32.
      fallback: what happens where a weight becomes dense: "dequantize" says nothing, "warn" warns and "error"
        raises, both with the operation, the weight and the line of the code. Look-ups of rows are no fallback.

    Raises:
      TypeError: for an `f` that can't be called, a dtype that is none of the three.
      ValueError: for an unknown `fallback`; when called, with "error", where a weight would become dense.
    """
    if not callable(f):
        raise TypeError(f"dispatch: f is a {type(f).__name__}; pass a function")
    dtype = None if dtype is None else np.dtype(jnp.dtype(dtype))
    if dtype is not None and dtype not in common.FLOAT_DTYPES:
        raise TypeError(f"dispatch: dtype={dtype.name} is not supported; pick float32, float16 or bfloat16")
    policy = Policy(fallback)

    def dispatched(*args: Any, **kwargs: Any) -> Any:
        return _call(f, args, kwargs, dtype, policy)

    name = getattr(f, "__name__", type(f).__name__)
    for attribute, value in (("__name__", name), ("__qualname__", getattr(f, "__qualname__", name))):
        setattr(dispatched, attribute, value)
    dispatched.__doc__ = getattr(f, "__doc__", None)
    if jax.tree_util.all_leaves([f]):  # Equinox takes a wrapped pytree for a mistake.
        dispatched.__wrapped__ = f  # type: ignore[attr-defined]
    return dispatched  # type: ignore[return-value]


def _call(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: Any, policy: Policy) -> Any:
    captured, run = captures.open_function(f)
    leaves, tree = jax.tree.flatten((captured, args, kwargs), is_leaf=_is_weight)
    leaves = [None if is_quantized(leaf) and is_absent(leaf) else leaf for leaf in leaves]
    traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) or is_quantized(leaf)]
    names = captures.names(f, (captured, args, kwargs), _is_weight) if policy.names_weights else None
    values = [
        view_of(leaves[i], dtype, names[i] if names else None) if is_quantized(leaves[i]) else leaves[i] for i in traced
    ]
    result: dict[str, Any] = {}

    def staged(arrays: list[Any]) -> list[Any]:
        inside = list(leaves)
        for i, array in zip(traced, arrays, strict=True):
            inside[i] = array
        outs, result["tree"] = jax.tree.flatten(run(*jax.tree.unflatten(tree, inside)))
        is_array = [isinstance(out, jax.Array) for out in outs]
        result["others"] = [None if array else out for array, out in zip(is_array, outs, strict=True)]
        result["is_array"] = is_array
        return [out for array, out in zip(is_array, outs, strict=True) if array]

    with staging(dtype, policy.names_weights):
        jaxpr = jax.make_jaxpr(staged)([value.aval if is_view(value) else value for value in values])
    inner, consts = _compat.open_jaxpr(jaxpr)
    arrays = iter(evaluate(inner, consts, values, policy))
    outs = [next(arrays) if array else other for array, other in zip(result["is_array"], result["others"], strict=True)]
    return jax.tree.unflatten(result["tree"], [out.result() if is_view(out) else out for out in outs])


def _is_weight(x: Any) -> bool:
    """Whether x goes in as one array, or is half of a partition; what is else incomplete stays a pytree."""
    return isinstance(x, QuantizedArray) and (is_complete(x) or is_absent(x))
