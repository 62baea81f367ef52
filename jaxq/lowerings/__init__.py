"""Where an operation runs: the table of implementations, and the one rule by which each operation is lowered.

A module of this package implements the operations for some platforms. It has
  NAME, PLATFORMS: its name; the platforms that it serves, None for every one.
  unavailable() -> str | None: why it can't be used in this process.
  refuses(op, *, spec) -> str | None: why it does not do an operation in a format.
  quantize, dequantize, quantized_matmul: the operations on arrays in storage order, traced like any JAX function;
    products get x[M, K] with leaves of rank 2, or x[B, M, K] with leaves of rank 3.
and may have variants() -> names of the form "NAME:variant".
"""

from __future__ import annotations

import platform as host
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from jax.interpreters import mlir

from jaxq import _compat
from jaxq.lowerings import cpu, xla
from jaxq.primitives import common
from jaxq.primitives.dequantize import dequantize_p
from jaxq.primitives.quantize import quantize_p
from jaxq.primitives.quantized_matmul import canonical, quantized_matmul_p
from jaxq.spec import QuantSpec

_APPLE_SILICON = sys.platform == "darwin" and host.machine() == "arm64"

common.IMPLEMENTATIONS.update({module.NAME: module for module in (cpu, xla)})

# platform -> what None stands for there: the first of these that is usable and does not refuse. Fastest first.
TABLE: dict[str, tuple[ModuleType, ...]] = {
    "cpu": (cpu, xla),
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


def choose(platform: str, name: str | None, op: str, spec: QuantSpec) -> ModuleType:
    """The module that runs `op` on `platform`: the one named, or the fastest that can.

    Raises:
      ValueError: where the one named does not serve the platform.
    """
    if name is None:
        candidates = TABLE.get(platform, EVERY_PLATFORM)
        return next(m for m in candidates if m.unavailable() is None and m.refuses(op, spec=spec) is None)
    module = common.IMPLEMENTATIONS[name.partition(":")[0]]
    if module.PLATFORMS is not None and platform not in module.PLATFORMS:
        raise ValueError(
            f"{op}: implementation={name!r} serves {', '.join(module.PLATFORMS)}, and this is lowered for {platform}"
        )
    return module


def _rule(op: str, platform: str | None) -> Any:
    """The lowering of `op` for one platform, or for every platform that has no rule of its own."""

    def rule(ctx: mlir.LoweringRuleContext, *operands: Any, implementation: str | None, **parameters: Any) -> Any:
        names: Sequence[str] = ctx.platforms or ctx.module_context.platforms
        # A module for several platforms shares one text; only plain operations run on all of them.
        target = platform or (names[0] if len(names) == 1 else "")
        module = choose(target, implementation, op, parameters["spec"])
        if hasattr(module, "lower"):
            return module.lower(ctx, op, operands, implementation=implementation, **parameters)
        lowered = mlir.lower_fun(_traced(module, op, implementation, parameters), multiple_results=True)
        ctx = ctx.replace(avals_in=[_compat.unpartitioned(aval) for aval in ctx.avals_in])
        return lowered(ctx, *operands)

    return rule


def _traced(module: ModuleType, op: str, implementation: str | None, parameters: dict[str, Any]) -> Any:
    function = getattr(module, op)
    if hasattr(module, "variants"):
        parameters = {**parameters, "implementation": implementation}

    def matmul(x: Any, *leaves: Any) -> list[Any]:
        x2, leaves2 = canonical(x, leaves)
        y = function(x2, *leaves2, **parameters)
        return [y.reshape(*x.shape[:-1], y.shape[-1])]

    if op == "quantized_matmul":
        return matmul
    return (
        (lambda *args: function(*args, **parameters))
        if op == "quantize"
        else (lambda *args: [function(*args, **parameters)])
    )


for _op, _primitive in (
    ("quantize", quantize_p),
    ("dequantize", dequantize_p),
    ("quantized_matmul", quantized_matmul_p),
):
    for _platform in TABLE:
        mlir.register_lowering(_primitive, _rule(_op, _platform), platform=_platform)
    mlir.register_lowering(_primitive, _rule(_op, None))
