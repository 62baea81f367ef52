"""Flax: `quantize(module, ...)` gives NNX modules quantized weights, in place, and they run like any other.

Each layer that can be quantized gets its kernel as a `QuantizedParam`, and becomes an instance of a subclass of its
class whose call goes through `jaxq.dispatch`. So `isinstance`, `nnx.jit`, `nnx.split` and `nnx.merge`, `nnx.vmap`,
`nnx.scan`, `nnx.grad` and Orbax work as before.

Linen needs none of this: `jaxq.dispatch(model.apply)(jaxq.quantize_tree(variables, spec), x)`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq.array import is_quantized
from jaxq.conventions import Axis, Rules
from jaxq.dispatch import dispatch
from jaxq.progress import Progress
from jaxq.reports import Report, is_array
from jaxq.tree import quantize_leaves

Module = TypeVar("Module", bound=nnx.Module)


class QuantizedParam(nnx.Variable[Any]):
    """A variable that holds a QuantizedArray. No `nnx.Param`, so `nnx.grad` and `nnx.Optimizer` leave it frozen."""


def quantize(
    module: Module,
    spec_or_rules: Rules,
    *,
    donate: bool = False,
    progress: Progress = None,
    report: Report | None = None,
    implementation: str | None = None,
) -> Module:
    """Quantize the weights of an NNX module in place.

    These layers, wherever they stand in it: Linear, LinearGeneral, Einsum, Embed (`attend` too), LoRALinear, and Conv
    with a window of one; MultiHeadAttention and the recurrent cells are made of these. Their subclasses count, too.
    Layers that were stacked by `nnx.vmap` over their construction are quantized whole. Everything else stays as it is,
    and is listed in the report. Paths are those of `nnx.state`: `blocks/0/linear/kernel`. A variable that several
    layers share stays shared; one that is also held by a module of another kind stays dense.

    Run it under `nnx.jit` or `jax.jit`: outside, each call of a layer traces it anew. Calls can't mutate a layer.
    Metadata that say how a dense array is sharded are dropped; the quantized leaves are sharded as it was.

    Args:
      module: any NNX module.
      spec_or_rules, donate, progress, report, implementation: as in `jaxq.quantize_tree`.

    Returns:
      The same module.

    Raises:
      ValueError: a weight with a NaN or an infinity in it, named by its path.
      TypeError: rules in none of the three forms, a `module` that is none.
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"integrations.flax.quantize: module is a {type(module).__name__}; pass an nnx.Module (the variables of a "
            "Linen module go through jaxq.quantize_tree)"
        )
    slots = _slots(module)
    conventions = {slot.path: (slot.axis, slot.reason) for slot in reversed(slots)}
    leaves = [(path, value) for path, value in _variables(module) if is_array(value)]
    results = quantize_leaves(
        "integrations.flax.quantize",
        leaves,
        spec_or_rules,
        lambda path, _: conventions[path],
        donate=donate,
        progress=progress,
        report=report,
        implementation=implementation,
    )
    quantized = {
        path: result
        for (path, leaf), result in zip(leaves, results, strict=True)
        if is_quantized(result) and not is_quantized(leaf)
    }
    made: dict[str, QuantizedParam] = {}
    for slot in slots:
        if slot.path in quantized:
            if slot.path not in made:
                made[slot.path] = _param(getattr(slot.layer, slot.name), quantized[slot.path])
            _install(slot, made[slot.path])
    return module


# ---- which variables


class _Slot(NamedTuple):
    """An attribute of a layer that holds a weight; `path` is where the variable was first met, `reason` why not."""

    layer: nnx.Module
    name: str
    path: str
    axis: Axis | list[Axis] | None
    reason: str


_FOREIGN = "no weight of a Linear, LinearGeneral, Einsum, Embed or Conv"


def _slots(module: nnx.Module) -> list[_Slot]:
    """Every attribute, of every module, that holds a variable; those that are no layer's weight with a reason."""
    slots: list[_Slot] = []
    first: dict[int, str] = {}
    for path, variable in _nodes(module, nnx.Variable):
        first[id(variable)] = _join(path)
    for _, owner in _nodes(module, nnx.Module):
        for name, variable in vars(owner).items():
            if isinstance(variable, nnx.Variable) and id(variable) in first:
                axis, reason = _weight(owner, name, variable)
                slots.append(_Slot(owner, name, first[id(variable)], axis, reason))
    # In lists and dicts, and the like.
    known = {slot.path for slot in slots}
    slots += [_Slot(module, "", path, None, _FOREIGN) for path in first.values() if path not in known]
    blocked = {slot.path: slot.reason for slot in slots if slot.reason}
    shared = {path for path in blocked if any(slot.path == path and not slot.reason for slot in slots)}
    return [
        slot._replace(axis=None, reason="shared with a layer that needs it dense") if slot.path in shared else slot
        for slot in slots
    ]


def _weight(layer: nnx.Module, name: str, variable: nnx.Variable[Any]) -> tuple[Axis | list[Axis] | None, str]:
    """The contracted axes of an attribute of a layer, and why it must stay dense."""
    for base, (weight, rule) in _LAYERS.items():
        if isinstance(layer, base) and name == weight:
            return rule(layer, variable)
    return None, _FOREIGN


def _linear_general(layer: Any, _: Any) -> tuple[Axis | list[Axis], str]:
    """kernel[batch..., in..., out...]; grouped along the last of out where the groups don't divide the last of in."""
    out, contracted = len(layer.out_features), len(layer.axis)
    return [tuple(range(-out - contracted, -out)), -1], ""


def _einsum(layer: Any, _: Any) -> tuple[Axis | None, str]:
    """The axes of the kernel that the result does not have, e.g. of "btd,dnh->btnh" the first."""
    if layer.einsum_str is None:
        return -1, "its equation is given by each call; give its contracted axes in a rule"
    operands, _, out = layer.einsum_str.replace(" ", "").partition("->")
    kernel = operands.split(",")[1]
    axes = tuple(i - len(kernel) for i, label in enumerate(kernel) if label not in out)
    return (axes, "") if axes and "." not in kernel else (-1, f"nothing to contract in {layer.einsum_str!r}")


def _conv(layer: Any, _: Any) -> tuple[Axis | None, str]:
    """kernel[1..., in, out]: a product for every point that the strides leave."""
    plain = not layer.input_dilation or np.all(np.asarray(layer.input_dilation) == 1)
    padded = not isinstance(layer.padding, str) and np.any(np.asarray(layer.padding))
    if any(size != 1 for size in layer.kernel_size):
        return None, f"of a convolution with a window of {tuple(layer.kernel_size)}"
    if layer.feature_group_count != 1 or layer.mask is not None or padded or not plain:
        return None, "of a convolution with groups, a mask, padding or a dilated input"
    return -2, ""


# layer -> its weight, and which axes of that are contracted. The first base that fits.
_LAYERS: dict[type, tuple[str, Callable[[Any, Any], tuple[Axis | list[Axis] | None, str]]]] = {
    nnx.Linear: ("kernel", lambda layer, _: (-2, "")),
    nnx.LinearGeneral: ("kernel", _linear_general),
    nnx.Einsum: ("kernel", _einsum),
    nnx.Embed: ("embedding", lambda layer, _: (-1, "")),
    nnx.Conv: ("kernel", _conv),
}


def _variables(module: nnx.Module) -> Iterator[tuple[str, Any]]:
    return ((_join(path), variable.get_value()) for path, variable in _nodes(module, nnx.Variable))


def _nodes(module: nnx.Module, kind: type) -> Iterator[tuple[Any, Any]]:
    return ((path, node) for path, node in nnx.iter_graph(module) if isinstance(node, kind))


def _join(path: Sequence[Any]) -> str:
    return "/".join(map(str, path))


# ---- the layers as they run


def _param(variable: nnx.Variable[Any], value: Any) -> QuantizedParam:
    dropped = ("out_sharding", "sharding_rules", "mesh", "hijax", "ref", "eager_sharding")
    metadata = {name: item for name, item in variable.get_metadata().items() if name not in dropped}
    return QuantizedParam(value, hijax=False, ref=False, **metadata)


def _install(slot: _Slot, variable: QuantizedParam) -> None:
    layer = slot.layer
    setattr(layer, slot.name, variable)
    if not getattr(type(layer), "jaxq_quantized", False):
        # In place: whoever holds the layer sees it. The module's own __setattr__ is for its state.
        object.__setattr__(layer, "__class__", _quantized_type(type(layer)))


@functools.cache
def _quantized_type(base: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass of a layer's class that runs under dispatch; one per class, so that `nnx.jit` knows it again."""
    methods: dict[str, Any] = {"__call__": _dispatched(base, "__call__"), "jaxq_quantized": True}
    if issubclass(base, nnx.Embed):
        methods["attend"] = _dispatched(base, "attend")
    namespace = {"__module__": __name__, "__doc__": base.__doc__, **methods}
    return types.new_class(f"Quantized{base.__name__}", (base,), exec_body=lambda body: body.update(namespace))


def __getattr__(name: str) -> Any:
    """`QuantizedLinear` and so on, where `pickle` looks for the classes that Flax's own layers become."""
    base = getattr(nnx, name.removeprefix("Quantized"), None) if name.startswith("Quantized") else None
    if isinstance(base, type) and issubclass(base, nnx.Module) and issubclass(base, tuple(_LAYERS)):
        return _quantized_type(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _dispatched(base: type[nnx.Module], name: str) -> Callable[..., Any]:
    method = getattr(base, name)

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _dispatch(method, _float_dtype(self))(self, *args, **kwargs)

    return call


@functools.cache
def _dispatch(method: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    return dispatch(method, dtype=dtype)


def _float_dtype(layer: Any) -> Any:
    """The dtype that the layer's weight had: that of its scales, or where those are bytes what the layer says."""
    weight = next(getattr(layer, name) for base, (name, _) in _LAYERS.items() if isinstance(layer, base)).get_value()
    return None if not is_quantized(weight) or weight.spec.is_affine else jnp.dtype(layer.param_dtype)
