"""Every use of JAX that its documented API does not cover, each with its reason.

Most are undocumented attributes of public objects; what comes from `jax._src` says why. Checked on jax 0.10.2 to 0.12.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jexc
import numpy as np
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.extend import source_info_util
from jax.sharding import PartitionSpec


def result_aval(operands: Sequence[Any], shape: Sequence[int], dtype: Any, spec: Sequence[Any]) -> Any:
    """The abstract value of a result, on the operands' mesh, partitioned as `spec` says.

    There is no public constructor that carries the mesh and the manual axes (the `varying` set of `jax.shard_map`);
    `update` of an operand's abstract value keeps both.
    """
    source = max(operands, key=lambda aval: len(aval.sharding.mesh.axis_names))
    sharding = source.sharding.update(spec=PartitionSpec(*spec))
    return source.update(shape=tuple(shape), dtype=np.dtype(dtype), weak_type=False, sharding=sharding)


def partition(aval: Any) -> tuple[Any, ...]:
    """Which mesh axes partition each dimension, where the mesh is explicit; a tuple of None elsewhere."""
    spec = tuple(aval.sharding.spec)
    return spec + (None,) * (len(aval.shape) - len(spec))


def align_varying(*operands: Any) -> tuple[Any, ...]:
    """The operands, each cast to vary over every manual mesh axis that any of them varies over.

    Inside `jax.shard_map` an operation's operands must agree in this; JAX's own primitives cast by themselves.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    union = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(x, tuple(sorted(union - own)), to="varying") if union - own else x
        for x, own in zip(operands, varying, strict=True)
    )


def unpartitioned(aval: Any) -> Any:
    """The abstract value without a mesh: for tracing a lowering's body, which XLA then partitions by itself."""
    return jax.core.ShapedArray(aval.shape, aval.dtype)


def require_devices(primitive: Any) -> None:
    """Have JAX tell the devices of a program when it lowers `primitive`.

    `custom_partitioning` needs them and asks for them itself, but JAX looks for such primitives before lowering, and
    ours turns into one only then. JAX has no public way to say so.
    """
    prim_requires_devices_during_lowering.add(primitive)


# ---- jaxprs. `jax.extend.core` exports their classes; how they are put together differs between versions.


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """A jaxpr without its constants, and those.

    To 0.10 a ClosedJaxpr wraps a Jaxpr; later there is one class, whose constants are an attribute where it has any.
    """
    return (jaxpr.jaxpr, list(jaxpr.consts)) if hasattr(jaxpr, "jaxpr") else (jaxpr, [])


def is_jaxpr(value: Any) -> bool:
    # Later than 0.10 the second is another name for the first, and may go.
    return isinstance(value, (jexc.Jaxpr, getattr(jexc, "ClosedJaxpr", jexc.Jaxpr)))


def constants_to_operands(jaxpr: Any) -> tuple[Any, list[Any]]:
    """An open jaxpr that takes its constants as its first operands, and those: what `remat_p` wants.

    `jax.checkpoint` does the same with a function of `jax._src`.
    """
    inner, consts = open_jaxpr(jaxpr)
    return inner.replace(constvars=[], invars=[*inner.constvars, *inner.invars]), consts


def rebind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluate one equation on other operands. `get_bind_params` is how `jax.core.eval_jaxpr` does it."""
    out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def equation_scope(eqn: Any) -> Iterator[None]:
    """Evaluate under an equation's own settings, name and source line, as `jax.core.eval_jaxpr` does.

    `eqn.ctx.manager` (mesh, compute type, XLA metadata) has no documented counterpart.
    """
    info = eqn.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=stack), eqn.ctx.manager:
        yield


def frames(eqn: Any) -> list[tuple[str, str, int]]:
    """(file, function, line) of each Python frame that made an equation, innermost first."""
    traceback = eqn.source_info.traceback
    return [] if traceback is None else [(f.file_name, f.function_name, f.line_num) for f in traceback.frames]


def scan_operands(params: dict[str, Any], count: int) -> tuple[list[int], list[int], list[int]]:
    """Which of a scan's `count` operands are constants, carries and scanned.

    To 0.10 two numbers say so (num_consts, num_carry); later a tree of flattened arguments (ft_in).
    """
    if "ft_in" in params:
        consts, carry, xs = params["ft_in"].update(range(count)).unpack()
        return list(consts), list(carry), list(xs)
    first, second = params["num_consts"], params["num_consts"] + params["num_carry"]
    return list(range(first)), list(range(first, second)), list(range(second, count))


@functools.cache
def unspecified_sharding() -> Any:
    """What stands in a jit equation for a sharding that nobody gave; its class is private."""
    return jax.make_jaxpr(jax.jit(lambda x: x))(0.0).eqns[0].params["in_shardings"][0]
