"""Which leaves of a tree are weights to quantize, and along which axis: a rule's word, or a framework's convention."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxq.array import normalize_axis
from jaxq.primitives.common import FLOAT_DTYPES
from jaxq.spec import QuantSpec

Axis = int | tuple[int, ...]
Choice = QuantSpec | tuple[QuantSpec, Axis] | None
Rule = tuple[str, QuantSpec | None] | tuple[str, QuantSpec | None, Axis]
Rules = QuantSpec | Iterable[Rule] | Callable[[str, Any], Choice]

# (path, leaf) -> the axis to group, and why the leaf is better left alone; "" if it is a weight. A list of axes: the
# first that the format's groups divide. None: no rule may ask for it either.
Convention = Callable[[str, Any], tuple[Axis | list[Axis] | None, str]]

# Below this many weights a matrix costs more in accuracy than the kilobyte or two that it would save.
SMALL = 1024

# Names of what is stored as an array of two or more axes (stacked layers, attention biases) and is yet no operand of
# a matrix product. The first pattern is matched with the last part of a path, the others with every part.
_NOT_A_WEIGHT = (
    (re.compile(r"(^|_)bias(es)?(_|$)|^(b|scale|gamma|beta|mean|var|count)$", re.I), True, "a {} by its name"),
    (re.compile(r"norm|^ln(_|\d|$)|^bn(_|\d|$)", re.I), False, "of a normalization, by the name {}"),
    (re.compile(r"pos(ition)?(al)?s?_?(emb|enc)|^wpe$", re.I), False, "position codes, by the name {}, are added"),
    (re.compile(r"lora", re.I), False, "an adapter, by the name {}"),
    (re.compile(r"conv", re.I), False, "of a convolution, by the name {}"),
)


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of a leaf: quantized to `spec` along `axis`, or left as it is for the `reason` given."""

    spec: QuantSpec | None = None
    axis: Axis = -1
    reason: str = ""


def path_string(path: Sequence[Any]) -> str:
    """A JAX key path as `params/Dense_0/kernel`.

    The last key is dropped where it is the `value` of a box, such as Flax's variables and partitioned parameters.
    """
    if len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def check_rules(function: str, rules: Any) -> Rules:
    """`rules` in one of its three forms, a list with its patterns compiled once.

    Raises:
      TypeError: for what is none of the three.
      ValueError: for a pattern that is no regular expression.
    """
    if isinstance(rules, QuantSpec) or callable(rules):
        return rules
    if isinstance(rules, str | dict) or not isinstance(rules, Iterable):
        raise TypeError(
            f"{function}: spec_or_rules is a {type(rules).__name__}; pass a QuantSpec, a list of (pattern, QuantSpec "
            "or None) or a function (path, leaf) -> QuantSpec or None"
        )
    checked = []
    for i, rule in enumerate(rules):
        good = isinstance(rule, tuple | list) and len(rule) in (2, 3) and isinstance(rule[0], str)
        if not good or not (rule[1] is None or isinstance(rule[1], QuantSpec)):
            raise TypeError(
                f"{function}: rule {i} is {rule!r}; pass (pattern, QuantSpec or None) or (pattern, QuantSpec, axis)"
            )
        try:
            re.compile(rule[0])
        except re.error as error:
            raise ValueError(
                f"{function}: the pattern {rule[0]!r} of rule {i} is no regular expression: {error}"
            ) from None
        checked.append(tuple(rule))
    return checked


def decide(leaves: Iterable[tuple[str, Any]], rules: Rules, convention: Convention) -> list[Decision]:
    """One decision per (path, leaf). A rule that speaks of a leaf by itself, not by a pattern, overrides convention."""
    return [_decide(path, leaf, rules, convention) for path, leaf in leaves]


def why_dense(leaves: Sequence[tuple[str, Any]], specs: Iterable[QuantSpec]) -> list[str]:
    """For each dense (path, leaf), why no format of `specs` fits it or why it is left alone by default; else ""."""
    decisions = [decide(leaves, spec, by_name(leaves)) for spec in specs]
    notes = []
    for i, (_, leaf) in enumerate(leaves):
        fits = any(row[i].spec is not None for row in decisions)
        notes.append("" if fits else decisions[0][i].reason if decisions else _impossible(leaf))
    return notes


def _decide(path: str, leaf: Any, rules: Rules, convention: Convention) -> Decision:
    spec, given, explicit, silent = _ask(path, leaf, rules)
    reason = _impossible(leaf)
    if reason or spec is None:
        return Decision(reason=reason or silent)
    axis, reason = convention(path, leaf)
    if not explicit and not reason and math.prod(leaf.shape) < SMALL:
        reason = f"small, {math.prod(leaf.shape)} weights"
    if axis is None or (reason and not explicit):
        return Decision(reason=reason)
    choices = axis if isinstance(axis, list) else [axis]
    fits = [_fit(leaf, spec, choice) for choice in (choices if given is None else [given])]
    return next((fit for fit in fits if fit.spec is not None), fits[0])


def _ask(path: str, leaf: Any, rules: Rules) -> tuple[QuantSpec | None, Axis | None, bool, str]:
    """The format and the axis that the rules give, whether that was said of this very leaf, and why there is none."""
    if isinstance(rules, QuantSpec):
        return rules, None, False, ""
    if callable(rules):
        choice = rules(path, leaf)
        spec, axis = choice if isinstance(choice, tuple) else (choice, None)
        if spec is not None and not isinstance(spec, QuantSpec):
            raise TypeError(
                f"quantize_tree: the rule gave {choice!r} for {path}; return a QuantSpec, (QuantSpec, axis) or None"
            )
        return spec, axis, True, "the rule gave None"
    for pattern, spec, *axes in rules:
        if re.search(pattern, path):
            return spec, axes[0] if axes else None, bool(axes), f"the rule {pattern!r} says so"
    return None, None, False, "no rule's pattern is found in its path"


def _impossible(leaf: Any) -> str:
    """Why no format could hold the leaf; "" if one might."""
    if leaf.dtype not in FLOAT_DTYPES:
        narrow = "; cast it to float32 first" if leaf.dtype == np.float64 else ""
        return f"{leaf.dtype} is none of float32, float16 and bfloat16{narrow}"
    if len(leaf.shape) < 2:
        return "a vector" if len(leaf.shape) else "a scalar"
    return "" if math.prod(leaf.shape) else "empty"


def _fit(leaf: Any, spec: QuantSpec, axis: Axis) -> Decision:
    """Quantized along `axis`, unless there is none such or its length is no multiple of the format's groups."""
    try:
        axes = normalize_axis("quantize_tree", axis, len(leaf.shape))
    except ValueError:
        return Decision(reason=f"axis {axis} is not legal for rank {len(leaf.shape)}")
    length = leaf.shape[axes[-1]]
    if length % spec.length_multiple:
        return Decision(reason=f"axis {axes[-1]} of length {length} is no multiple of {spec.length_multiple} ({spec})")
    return Decision(spec, axes)


# ---- conventions by name


def by_name(leaves: Iterable[tuple[str, Any]], axis: Axis = -1) -> Convention:
    """The names of Flax, Equinox and torch; `axis` for weights of any other name. See `quantize_tree`."""
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves}
    attention = _attention_prefixes(shapes)

    def convention(path: str, leaf: Any) -> tuple[Axis | list[Axis], str]:
        parts = path.split("/")
        for pattern, last_only, reason in _NOT_A_WEIGHT:
            for part in parts[-1:] if last_only else parts:
                if pattern.search(part):
                    return axis, reason.format(part)
        last = parts[-1]
        if last in ("embedding", "weight") or last.startswith("weight_"):
            return -1, ""  # Flax's Embed [vocabulary, features]; Equinox's and torch's [out, in]
        return (axis, "") if last != "kernel" else _kernel_axis(path, shapes, attention)

    return convention


def _kernel_axis(
    path: str, shapes: Mapping[str, tuple[int, ...]], attention: frozenset[str]
) -> tuple[Axis | list[Axis], str]:
    """Of Flax's kernels: those of an attention layer, [in, out] or a stack of them, [in..., out...] beside a bias.

    Where the groups don't divide the axis that is contracted, say heads of 64 and groups of 128, the last one will do:
    it may be free, but it is no stack's, and a product with a weight that is grouped along it runs fused as well.
    """
    for prefix in attention:
        layer = path.removeprefix(prefix)
        if layer in ("query/kernel", "key/kernel", "value/kernel"):
            return [-3, -1], ""  # [in, heads, head_dim]
        if layer == "out/kernel":
            return [(-3, -2), -1], ""  # [heads, head_dim, out]
    kernel, bias = shapes[path], shapes.get(path.removesuffix("kernel") + "bias", ())
    if len(kernel) == 2 or bias == (*kernel[:-2], kernel[-1]):
        return -2, ""
    contracted = _beside(kernel, bias)
    # Beside a vector, a kernel of rank 4 is more likely that of a convolution.
    if contracted and (len(kernel) == 3 or (len(kernel) == 4 and len(bias) > 1)):
        return [contracted, -1], ""
    return [-2, -1], f"a kernel of rank {len(kernel)}: give its contracted axes in a rule" if len(kernel) > 3 else ""


def _beside(kernel: tuple[int, ...], bias: tuple[int, ...]) -> tuple[int, ...] | None:
    """The neighbouring axes without which a kernel has the shape of the bias, the last axis not among them."""
    count = len(kernel) - len(bias)
    for i in range(len(kernel) - count if bias else 0):
        if (*kernel[:i], *kernel[i + count :]) == bias:
            return tuple(range(i - len(kernel), i + count - len(kernel)))
    return None


def _attention_prefixes(shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """The paths of Flax's attention layers: where query, key, value and out stand side by side."""
    paths = {path for path, shape in shapes.items() if len(shape) >= 3}
    prefixes = (path.removesuffix("query/kernel") for path in paths if path.endswith("query/kernel"))
    names = ("query", "key", "value", "out")
    return frozenset(prefix for prefix in prefixes if all(f"{prefix}{name}/kernel" in paths for name in names))
