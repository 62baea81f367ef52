"""What the three primitives share: the choice of an implementation, evaluation outside jit, output types."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad

from jaxq.spec import QuantSpec

FLOAT_DTYPES = tuple(np.dtype(jax.numpy.dtype(name)) for name in ("float32", "float16", "bfloat16"))

# name -> the module of jaxq.lowerings that implements it. Filled by jaxq.lowerings, so that nothing here imports it.
IMPLEMENTATIONS: dict[str, ModuleType] = {}

# Part of jit's cache key, unlike a ContextVar: a function traced under one choice is traced anew under another.
_chosen = jax.make_user_context(None)


@contextlib.contextmanager
def use_implementation(name: str | None) -> Iterator[None]:
    """Make `name` the implementation of every jaxq operation traced in the block; None gives the choice back.

    Takes part in the cache key of `jax.jit`. An `implementation=` argument of a call wins over it. Per thread.

    Raises:
      ValueError: for a name that is unknown or can't be used in this process; the message says what is missing.
    """
    check_implementation("use_implementation", name)
    with _chosen(name):
        yield


def current_implementation() -> str | None:
    """What the surrounding `use_implementation` names; None outside of one."""
    return _chosen.value


def check_implementation(function: str, name: str | None, op: str | None = None, spec: QuantSpec | None = None) -> None:
    """Raise ValueError where `name` is unknown, unusable in this process, or refuses `op` in the format `spec`."""
    if name is None:
        return
    base = name.partition(":")[0] if isinstance(name, str) else name
    if base not in IMPLEMENTATIONS:
        raise ValueError(
            f"{function}: implementation={name!r} is unknown; pick one of {', '.join(IMPLEMENTATIONS)}, "
            "or None for the fastest that serves the platform"
        )
    module = IMPLEMENTATIONS[base]
    reason = module.unavailable() if name == base else _variant_unavailable(module, name)
    if reason is None and op is not None and spec is not None:
        reason = refusal(module, op, spec)
    if reason is not None:
        raise ValueError(f"{function}: implementation={name!r} can't be used here: {reason}")


def refusal(module: ModuleType, op: str, spec: QuantSpec) -> str | None:
    """Why an implementation does not do `op` in the format `spec`; None where it does."""
    if spec.held_by not in (None, module.NAME):
        return f"the weight's data is held by {spec.held_by}, outside JAX (see jaxq.resident)"
    return module.refuses(op, spec=spec)


def _variant_unavailable(module: ModuleType, name: str) -> str | None:
    reason = module.unavailable()
    if reason is not None:
        return reason
    variants = module.variants() if hasattr(module, "variants") else ()
    if name in variants:
        return None
    return f"it has no such variant on this machine; {', '.join(variants) or 'it has none'}"


def resolve_implementation(function: str, name: str | None, op: str, spec: QuantSpec) -> str | None:
    """The implementation that stands in the jaxpr: the argument, else the surrounding `use_implementation`'s.

    None stays None: which one is fastest depends on the platform that the program is lowered for.
    """
    name = _chosen.value if name is None else name
    check_implementation(function, name, op, spec)
    return name


def define(name: str, abstract_eval: Any, *, multiple_results: bool) -> Primitive:
    """A primitive whose evaluation outside jit goes through jit's own cache, one entry per parameters and types."""
    primitive = Primitive(name)
    primitive.multiple_results = multiple_results
    primitive.def_abstract_eval(abstract_eval)

    @functools.cache
    def compiled(parameters: tuple[tuple[str, Any], ...]) -> Any:
        return jax.jit(functools.partial(primitive.bind, **dict(parameters)))

    def evaluate(*args: Any, **parameters: Any) -> Any:
        with jax.disable_jit(False):  # A user's jax.disable_jit would bring this straight back here.
            return compiled(tuple(parameters.items()))(*args)

    primitive.def_impl(evaluate)
    return primitive


def zero_tangent(value: Any) -> ad.Zero:
    return ad.Zero(jax.typeof(value).to_tangent_aval())


def is_zero(tangent: Any) -> bool:
    """Whether a tangent is known to be zero; integers have only such tangents (dtype float0)."""
    return type(tangent) is ad.Zero or jax.typeof(tangent).dtype == jax.dtypes.float0


def instantiate(tangent: Any, primal: Any) -> Any:
    """A tangent as an array: zeros like `primal` where it is symbolically zero."""
    return jax.numpy.zeros_like(primal) if is_zero(tangent) else tangent


def batch_leading(args: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
    """Every operand with its batch axis first; those without one are broadcast."""
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    return [
        jax.numpy.broadcast_to(arg, (size, *arg.shape)) if dim is None else jax.numpy.moveaxis(arg, dim, 0)
        for arg, dim in zip(args, dims, strict=True)
    ]
