"""Weights that a function holds itself: in its closure, its globals, its bound arguments, its own leaves."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.tree_util import keystr

from jaxq.array import is_quantized

# Calls the function with (captured, args, kwargs), where captured is the pytree that came with it.
Run = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def open_function(f: Any) -> tuple[Any, Run]:
    """What `f` captures that holds quantized weights, as a pytree, and how to call `f` with other values for it.

    A callable pytree is captured whole; of a `functools.partial` its arguments, of a method its object, of a Python
    function those variables of its closure and those globals that hold weights. The function is not changed: the call
    goes to a copy of it. Variables of functions that it calls are not looked into.
    """
    if not jax.tree_util.all_leaves([f]) and _holds_weight(f):
        return f, lambda captured, args, kwargs: captured(*args, **kwargs)
    if isinstance(f, functools.partial):
        inner, run = open_function(f.func)
        return (inner, f.args, f.keywords), lambda captured, args, kwargs: run(
            captured[0], (*captured[1], *args), {**captured[2], **kwargs}
        )
    if isinstance(f, types.MethodType) and _holds_weight(f.__self__):
        return f.__self__, lambda captured, args, kwargs: f.__func__(captured, *args, **kwargs)
    if isinstance(f, types.FunctionType):
        held = _Held(_closure(f), _defaults(f), _globals(f))
        if any(held):
            return held, lambda captured, args, kwargs: _copy(f, captured)(*args, **kwargs)
    return None, lambda captured, args, kwargs: f(*args, **kwargs)


class _Held(NamedTuple):
    """The variables of a function that hold weights, by name."""

    closure: dict[str, Any]
    defaults: dict[str, Any]
    globals: dict[str, Any]


def _closure(f: types.FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        if _holds_weight(value):
            found[name] = value
    return found


def _defaults(f: types.FunctionType) -> dict[str, Any]:
    defaults = f.__defaults__ or ()
    names = f.__code__.co_varnames[: f.__code__.co_argcount][f.__code__.co_argcount - len(defaults) :]
    values = {**dict(zip(names, defaults, strict=True)), **(f.__kwdefaults__ or {})}
    return {name: value for name, value in values.items() if _holds_weight(value)}


def _globals(f: types.FunctionType) -> dict[str, Any]:
    values = {name: f.__globals__[name] for name in _global_names(f.__code__) if name in f.__globals__}
    return {name: value for name, value in values.items() if _holds_weight(value)}


@functools.lru_cache(maxsize=1024)
def _global_names(code: types.CodeType) -> frozenset[str]:
    """The globals that a function, or one defined in it, reads; none if it writes any, since a copy would not."""
    names: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            return frozenset()
        if instruction.opname == "LOAD_GLOBAL":
            names.add(instruction.argval)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names |= _global_names(const)
    return frozenset(names)


def _holds_weight(value: Any) -> bool:
    return any(map(is_quantized, jax.tree.leaves(value, is_leaf=is_quantized)))


def _copy(f: types.FunctionType, held: _Held) -> types.FunctionType:
    """The function with other values in those variables; the other cells of its closure are shared with it."""
    code = f.__code__
    closure = tuple(
        types.CellType(held.closure[name]) if name in held.closure else cell
        for name, cell in zip(code.co_freevars, f.__closure__ or (), strict=True)
    )
    defaults = f.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount][code.co_argcount - len(defaults) :]
    defaults = tuple(held.defaults.get(name, value) for name, value in zip(names, defaults, strict=True))
    scope = {**f.__globals__, **held.globals} if held.globals else f.__globals__
    copy = types.FunctionType(code, scope, f.__name__, defaults or None, closure or None)
    keywords = f.__kwdefaults__
    copy.__kwdefaults__ = keywords and {name: held.defaults.get(name, value) for name, value in keywords.items()}
    return copy


def names(f: Any, parts: tuple[Any, tuple[Any, ...], dict[str, Any]], is_leaf: Callable[[Any], bool]) -> list[str]:
    """What to call each leaf of (captured, args, kwargs): its path, from the name of the argument or variable."""
    captured, args, kwargs = parts
    try:
        positional = list(inspect.signature(f).parameters.values())
    except (TypeError, ValueError):
        positional = []
    plain = [p.name for p in positional if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    own = getattr(f, "__name__", type(f).__name__)
    # Variables in the order in which JAX flattens dicts.
    held = isinstance(captured, _Held)
    roots = [item for part in captured for item in sorted(part.items())] if held else [(own, captured)]
    roots += [(plain[i] if i < len(plain) else f"args[{i}]", arg) for i, arg in enumerate(args)]
    roots += sorted(kwargs.items())
    return [
        name + keystr(path)
        for name, tree in roots
        for path, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    ]
