"""What a QuantizedArray is while a function is traced by dispatch, where it is no argument: met in a closure, say."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple

import jax
import numpy as np

from jaxq.array import QuantizedArray, from_storage, set_placeholder
from jaxq.dispatch.fallback import NAME_SCOPE, is_user_file
from jaxq.primitives.dequantize import bind_dequantize


class _Settings(NamedTuple):
    dtype: np.dtype | None
    named: bool


# Part of jit's cache key: with a ContextVar, a function traced here would be found by a call from outside, which must
# not see placeholders, and the other way round.
_settings = jax.make_user_context(None)


@contextlib.contextmanager
def staging(dtype: np.dtype | None, named: bool) -> Iterator[None]:
    """In the block, a QuantizedArray that meets JAX becomes an equation `dequantize`, which is then a view.

    `dtype` is that of the float array it looks like; `named`: say in the equation's scope which variable it was.
    """
    with _settings(_Settings(dtype, named)):
        yield


_ARRAYS = (jax.Array, np.ndarray)


def is_complete(qw: QuantizedArray) -> bool:
    """Whether all leaves are arrays, and not what a partition or a filter has put there."""
    return all(isinstance(leaf, _ARRAYS) for leaf in qw.leaves)


def is_absent(qw: QuantizedArray) -> bool:
    """Whether all leaves are None: the other half of a partition."""
    return all(leaf is None for leaf in qw.leaves)


def _placeholder(qw: QuantizedArray) -> Callable[[], jax.Array] | None:
    settings = _settings.value
    return functools.partial(_trace, qw, settings) if settings is not None and is_complete(qw) else None


def _trace(qw: QuantizedArray, settings: _Settings) -> jax.Array:
    dtype = qw.float_dtype if settings.dtype is None else settings.dtype
    scope = jax.named_scope(NAME_SCOPE + (_variable(qw) or "")) if settings.named else contextlib.nullcontext()
    with scope:
        return from_storage(bind_dequantize(*qw.leaves, spec=qw.spec, dtype=dtype), qw.axis)


set_placeholder(_placeholder)


def _variable(qw: QuantizedArray) -> str | None:
    """The name of the variable, or of the attribute of one, that holds a weight where the user's code meets it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_user_file(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return None
    names = {name: frame.f_globals[name] for name in frame.f_code.co_names if name in frame.f_globals}
    for name, value in {**names, **frame.f_locals}.items():
        if value is qw:
            return name
        for attribute, held in getattr(value, "__dict__", {}).items() if not isinstance(value, type) else ():
            if held is qw:
                return f"{name}.{attribute}"
    return None
