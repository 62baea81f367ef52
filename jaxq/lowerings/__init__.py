"""Where an operation runs: the table of implementations, and the one rule by which each operation is lowered.

A module of this package implements the operations for some platforms. It has
  NAME, PLATFORMS: its name; the platforms that it serves, None for every one.
  unavailable() -> str | None: why it can't be used in this process.
  refuses(op, *, spec) -> str | None: why it does not do an operation in a format.
  quantize, dequantize, quantized_matmul: the operations on arrays in storage order, traced like any JAX function;
    weights are of rank 2 or more, and products get x[M, K] with leaves of rank 2, or x[B, M, K] with leaves of rank 3.
and may have
  variants() -> names of the form "NAME:variant".
  unsuited(ctx) -> str | None: why it can't stand in the program that is being lowered.
  OPAQUE = True: XLA can't look into it, and is told how to partition it.
  INDEXES = True: `quantized_matmul` takes `index`, int32[] or None, and reads an element of a stack where it lies; for
    the others the element is copied out of the stack first.
  lower(ctx, op, operands, *, implementation, **parameters): a lowering rule, in the place of the three operations.
"""

from __future__ import annotations

import functools
import platform as host
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from jax.interpreters import mlir

from jaxq import _compat
from jaxq.lowerings import cpu, mlx, mps, xla
from jaxq.lowerings.partition import automatic_devices, partitioned
from jaxq.primitives import common
from jaxq.primitives.dequantize import dequantize_p
from jaxq.primitives.quantize import quantize_p
from jaxq.primitives.quantized_matmul import canonical, element, quantized_matmul_p, split
from jaxq.spec import QuantSpec

_APPLE_SILICON = sys.platform == "darwin" and host.machine() == "arm64"

common.IMPLEMENTATIONS.update({module.NAME: module for module in (cpu, mlx, mps, xla)})

# platform -> what None stands for there: the first of these that is usable and does not refuse. Fastest first.
TABLE: dict[str, tuple[ModuleType, ...]] = {
    # Where MLX has no GPU it is the slowest, so there it stands for None only with weights that it holds itself.
    "cpu": (mlx, cpu, xla) if _APPLE_SILICON else (cpu, xla, mlx),
    "mps": (mps, xla),
}
EVERY_PLATFORM = (xla,)


def implementations() -> dict[str, dict[str, str]]:
    """Per platform, every implementation that serves it: "default", "usable", or why it is not.

    The platforms are those of `jaxq.lowerings.TABLE`, and "other" for all the rest.
    """
    found: dict[str, dict[str, str]] = {}
    for platform in (*TABLE, "other"):
        row = {}
        for name, module in common.IMPLEMENTATIONS.items():
            if module.PLATFORMS is None or platform in module.PLATFORMS:
                row[name] = module.unavailable() or "usable"
        default = next(m.NAME for m in TABLE.get(platform, EVERY_PLATFORM) if row[m.NAME] == "usable")
        found[platform] = row | {default: "default"}
    return found


def choose(platform: str, name: str | None, op: str, spec: QuantSpec, ctx: mlir.LoweringRuleContext) -> ModuleType:
    """The module that runs `op` on `platform`: the one named, or the fastest that can.

    Raises:
      ValueError: where the one named serves neither the platform nor the program, or none can.
    """
    if name is None:
        reasons = {}
        for module in TABLE.get(platform, EVERY_PLATFORM):
            reason = module.unavailable() or common.refusal(module, op, spec) or _unsuited(module, ctx)
            if reason is None:
                return module
            reasons[module.NAME] = reason
        raise ValueError(f"{op}: no implementation can run {spec} on {platform}: {reasons}")
    module = common.IMPLEMENTATIONS[name.partition(":")[0]]
    if module.PLATFORMS is not None and platform not in module.PLATFORMS:
        raise ValueError(
            f"{op}: implementation={name!r} serves {', '.join(module.PLATFORMS)}, and this is lowered for {platform}"
        )
    reason = _unsuited(module, ctx)
    if reason is not None:
        raise ValueError(f"{op}: implementation={name!r} can't be used here: {reason}")
    return module


def _unsuited(module: ModuleType, ctx: mlir.LoweringRuleContext) -> str | None:
    return module.unsuited(ctx) if hasattr(module, "unsuited") else None


def _rule(op: str) -> Any:
    """The lowering of `op`, one for every platform: JAX takes rules of their own only for platforms that it knows."""

    def rule(ctx: mlir.LoweringRuleContext, *operands: Any, implementation: str | None, **parameters: Any) -> Any:
        platforms: Sequence[str] = ctx.platforms or ctx.module_context.platforms
        # A module for several platforms shares one text; only plain operations run on all of them.
        target = platforms[0] if len(platforms) == 1 else f"several platforms ({', '.join(platforms)})"
        spec = parameters["spec"]
        module = choose(target, implementation, op, spec, ctx)
        indexed = op == "quantized_matmul" and bool(split(operands, spec)[2])
        copied = indexed and not getattr(module, "INDEXES", False)
        if hasattr(module, "lower") and not copied:
            return module.lower(ctx, op, operands, implementation=implementation, **parameters)
        ctx = ctx.replace(avals_in=[_compat.unpartitioned(aval) for aval in ctx.avals_in])
        if copied:
            element_product = functools.partial(_copied, implementation=implementation, **parameters)
            return mlir.lower_fun(element_product, multiple_results=False)(ctx, *operands)
        function = _traced(module, op, implementation, parameters)
        if getattr(module, "OPAQUE", False) and automatic_devices(ctx) > 1:
            function = partitioned(op, function, ctx.avals_in, spec, parameters.get("transpose"), indexed=indexed)
        return mlir.lower_fun(function, multiple_results=True)(ctx, *operands)

    return rule


def _copied(*operands: Any, **parameters: Any) -> Any:
    """A product with an element of a stack as one with a copy of it."""
    x, leaves, index = split(operands, parameters["spec"])
    return quantized_matmul_p.bind(x, *element(leaves, *index), **parameters)


def _traced(module: ModuleType, op: str, implementation: str | None, parameters: dict[str, Any]) -> Any:
    function = getattr(module, op)
    if hasattr(module, "variants"):
        parameters = {**parameters, "implementation": implementation}

    def matmul(*operands: Any) -> list[Any]:
        x, leaves, index = split(operands, parameters["spec"])
        x2, leaves2 = canonical(x, leaves, index)
        y = function(x2, *leaves2, **parameters, **({"index": index[0]} if index else {}))
        return [y.reshape(*x.shape[:-1], y.shape[-1])]

    def dequantize(*leaves: Any) -> list[Any]:
        if leaves[0].ndim > 1:
            return [function(*leaves, **parameters)]
        return [function(*(leaf[None] for leaf in leaves), **parameters)[0]]  # a single row

    def quantize(w: Any) -> list[Any]:
        return function(w, **parameters)

    return {"quantize": quantize, "dequantize": dequantize, "quantized_matmul": matmul}[op]


for _op, _primitive in (
    ("quantize", quantize_p),
    ("dequantize", dequantize_p),
    ("quantized_matmul", quantized_matmul_p),
):
    mlir.register_lowering(_primitive, _rule(_op))
    _compat.require_devices(_primitive)
