"""How XLA partitions an operation that it can't look into.

A custom call in a program for several devices would have its operands gathered on each of them, weights and all.
`partitioned` tells XLA instead which axes may stay split: batch axes and rows of x, rows of the weight, and the
contracted axis, whose partial products are then summed over the devices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxq.spec import WORD_BITS, QuantSpec

# The partition of one axis: a mesh axis, several, or none.
Part = str | tuple[str, ...] | None


def automatic_devices(ctx: mlir.LoweringRuleContext) -> int:
    """Over how many devices XLA partitions the program that is being lowered: 1 inside `jax.shard_map`."""
    context = ctx.module_context.axis_context
    if isinstance(context, mlir.SPMDAxisContext):
        # Of the axes of the mesh, those that jax.shard_map has not taken are XLA's.
        return math.prod(size for name, size in context.mesh.shape.items() if name not in context.manual_axes)
    return getattr(context, "num_devices", None) or 1


def partitioned(
    op: str,
    function: Callable[..., Any],
    operands: Sequence[Any],
    spec: QuantSpec,
    transpose: bool | None,
    *,
    indexed: bool = False,
) -> Callable[..., Any]:
    """`function` on operands of these shapes, in a form that XLA can partition.

    `indexed`: whether the last operand of a product is an index into the first axis of the leaves.
    """
    wrapped = custom_partitioning(function)
    plan = {"quantize": _plan_quantize, "dequantize": _plan_dequantize}.get(op) or functools.partial(
        _plan_element if indexed else _plan_matmul, transpose=bool(transpose)
    )

    def partition(mesh: Mesh, arguments: Sequence[Any], _: Any) -> Any:
        argument_specs, result_specs, reduced = plan(mesh, [_parts(a) for a in arguments], arguments, spec)

        def local(*args: Any) -> Any:
            outs = function(*args)
            return [lax.psum(y, reduced) for y in outs] if reduced else outs

        shardings = [NamedSharding(mesh, PartitionSpec(*s)) for s in argument_specs]
        out = [NamedSharding(mesh, PartitionSpec(*s)) for s in result_specs]
        return mesh, local, out, tuple(shardings)

    rule, sizes = _rule(op, operands[: len(operands) - indexed], spec, transpose, ["l"] * indexed)
    wrapped.def_partition(partition, sharding_rule=rule, need_replication_factors=("l",) * indexed, **sizes)
    return wrapped


def _rule(
    op: str, operands: Sequence[Any], spec: QuantSpec, transpose: bool | None, stack: list[str]
) -> tuple[str, dict[str, int]]:
    """The correspondence of axes in Shardy's notation, and the sizes of the factors that stand in no axis alone.

    An axis of K weights is G groups of g weights, and its words are G groups of r words, so a split of one that is
    along G is a split of the others. Where a group is no whole number of words, only `partition` can tell; and a
    single group is not split at all (Shardy refuses a factor of 1 among several).
    """
    lead = [f"b{i}" for i in range(operands[-1].ndim - 2 - len(stack))]
    words, remainder = divmod(spec.group_size * spec.bits, WORD_BITS)
    groups = spec.groups(operands[-1].shape[-1]) if op == "quantize" else operands[-1].shape[-1]
    if remainder or groups == 1:
        k, w, g, sizes = "k", "w", "g", {}
    else:
        k, w, g = "(g e)", "g" if words == 1 else "(g r)", "g"
        sizes = {"e": spec.group_size} | ({"r": words} if words > 1 else {})
    weight = [[*stack, *lead, "n", w], *[[*stack, *lead, "n", g]] * (spec.leaf_count - 1)]
    if op == "quantize":
        inputs, outputs = [[*lead, "n", k]], weight
    elif op == "dequantize":
        inputs, outputs = weight, [[*lead, "n", k]]
    else:
        free = [f"m{i}" for i in range(operands[0].ndim - len(lead) - 1)]
        contracted, out = (k, "n") if transpose else ("n", k)
        inputs, outputs = [[*lead, *free, contracted], *weight, *[[] for _ in stack]], [[*lead, *free, out]]
    return ", ".join(map(" ".join, inputs)) + " -> " + ", ".join(map(" ".join, outputs)), sizes


def _plan_quantize(mesh: Mesh, parts: list[list[Part]], arguments: Sequence[Any], spec: QuantSpec) -> Any:
    (part,) = parts
    *lead, last = _divisible(mesh, part, arguments[0].shape)
    last = _whole_groups(mesh, last, arguments[0].shape[-1], spec)
    return [(*lead, last)], [(*lead, last)] * spec.leaf_count, ()


def _plan_dequantize(mesh: Mesh, parts: list[list[Part]], arguments: Sequence[Any], spec: QuantSpec) -> Any:
    packed = arguments[0]
    *lead, last = _divisible(mesh, parts[0], packed.shape)
    last = _whole_groups(mesh, last, spec.length(packed.shape[-1]), spec)
    return [(*lead, last)] * spec.leaf_count, [(*lead, last)], ()


def _plan_matmul(
    mesh: Mesh, parts: list[list[Part]], arguments: Sequence[Any], spec: QuantSpec, *, transpose: bool
) -> Any:
    x, packed = arguments[:2]
    batch = packed.ndim - 2
    x_part, w_part = _divisible(mesh, parts[0], x.shape), _divisible(mesh, parts[1], packed.shape)
    rows, length = w_part[-2], _whole_groups(mesh, w_part[-1], spec.length(packed.shape[-1]), spec)
    contracted, outer = (length, rows) if transpose else (rows, length)
    if contracted is not None and contracted != x_part[-1]:
        # x is the small operand: it is moved to where the weight is.
        x_part[-1] = contracted
    elif contracted is None and x_part[-1] is not None:
        # x is split along the contracted axis and the weight, whole on every device, can be cut to match for nothing.
        contracted = x_part[-1]
        if transpose:
            contracted = _whole_groups(mesh, contracted, spec.length(packed.shape[-1]), spec)
        x_part[-1] = contracted
    # A mesh axis can split one axis of the result only, and none of it where it splits the contracted one.
    used = set(_names(contracted))
    outer = _unused(outer, used)
    used |= set(_names(outer))
    lead = []
    for axis, part in enumerate(x_part[:-1]):
        part = _unused(part if part is not None or axis >= batch else w_part[axis], used)
        used |= set(_names(part))
        lead.append(part)
    rows, length = (outer, contracted) if transpose else (contracted, outer)
    weight = (*lead[:batch], rows, length)
    return [(*lead, contracted), *[weight] * spec.leaf_count], [(*lead, outer)], _names(contracted)


def _plan_element(
    mesh: Mesh, parts: list[list[Part]], arguments: Sequence[Any], spec: QuantSpec, *, transpose: bool
) -> Any:
    """`_plan_matmul` for one element of a stack; the stack is not split along its own axis."""
    x, *leaves, _ = arguments
    one = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in leaves]
    x_part, *leaf_parts, _ = parts
    (x_spec, *weights), outs, reduced = _plan_matmul(
        mesh, [x_part, *(part[1:] for part in leaf_parts)], [x, *one], spec, transpose=transpose
    )
    return [x_spec, *((None, *weight) for weight in weights), ()], outs, reduced


def _parts(argument: Any) -> list[Part]:
    spec = tuple(argument.sharding.spec)
    return [*spec, *[None] * (len(argument.shape) - len(spec))]


def _names(part: Part) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _count(mesh: Mesh, part: Part) -> int:
    return math.prod(mesh.shape[name] for name in _names(part))


def _divisible(mesh: Mesh, parts: Sequence[Part], shape: Sequence[int]) -> list[Part]:
    """Without the splits that don't come out even."""
    return [part if size % _count(mesh, part) == 0 else None for part, size in zip(parts, shape, strict=True)]


def _whole_groups(mesh: Mesh, part: Part, length: int, spec: QuantSpec) -> Part:
    """None where a split of the grouped axis would cut through a group or a word."""
    return part if length % (_count(mesh, part) * spec.length_multiple) == 0 else None


def _unused(part: Part, used: set[str]) -> Part:
    return None if used & set(_names(part)) else part
