"""Trees of weights: quantized leaf by leaf, so that no more than one dense leaf need exist beside the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxq import reports
from jaxq.array import QuantizedArray, is_quantized
from jaxq.conventions import Axis, Convention, Decision, Rules, by_name, check_rules, decide, path_string
from jaxq.primitives.common import check_implementation
from jaxq.primitives.dequantize import dequantize
from jaxq.primitives.quantize import quantize
from jaxq.progress import Progress, track
from jaxq.spec import QuantSpec


def quantize_tree(
    tree: Any,
    spec_or_rules: Rules,
    *,
    axis: Axis = -1,
    donate: bool = False,
    progress: Progress = None,
    report: reports.Report | None = None,
    implementation: str | None = None,
) -> Any:
    """Quantize the weights of a tree; everything else stays as it is.

    Left alone, each with its reason in the report: arrays that no format can hold (vectors, integers, lengths that the
    groups don't divide); what goes by the name of a bias, a normalization, a position embedding, an adapter or a
    convolution; matrices of fewer than 1024 weights; and what is quantized already. An array that stands in several
    places is quantized once, and the result stands in all of them.

    The grouped axis is a rule's, or that of the leaf's name: -2 for Flax's `kernel` [in, out], -3 and (-3, -2) in its
    attention layers, -1 for `embedding` and for the `weight` of Equinox and torch, and `axis` for every other name. A
    kernel of rank 3 or more beside a bias, as of DenseGeneral, is grouped along the axes that the bias lacks. Where
    groups don't divide that axis of a kernel of rank 3 or more, it is -1. Whichever it is, `jaxq.dispatch` runs the
    product fused; a rule can say better.

    Args:
      tree: any pytree of arrays, of JAX's or of NumPy's: dicts, Flax variables and states, Equinox modules.
      spec_or_rules: which format.
        A `QuantSpec`: for every weight.
        A list of (pattern, QuantSpec or None): the first whose pattern, a regular expression, is found in the leaf's
          path (`params/Dense_0/kernel`) holds, and None leaves the leaf alone, as does no match. With a third item,
          the axis, the leaf is quantized whatever its name and size.
        A function (path, leaf) -> QuantSpec, (QuantSpec, axis) or None: what it asks for is quantized whatever its name
          and size.
      axis: the grouped axis of weights whose name says nothing.
      donate: free each dense array as soon as it is quantized: `tree` is not usable afterwards. Without, `tree` stays
        whole, and so does the memory that it takes. NumPy arrays can't be freed.
      progress: True, "tqdm" or "rich" shows a bar, as does a function such as `tqdm.tqdm`.
      report: a `Report` to fill, with the reason of every skip and with relative errors, each of which needs a dense
        copy of one leaf for a moment.
      implementation: which implementation quantizes; None for the fastest of the platform.

    Raises:
      ValueError: a weight with a NaN or an infinity in it, named by its path; a pattern that is no regular expression.
      TypeError: rules in none of the three forms.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)
    leaves = [(path_string(path), leaf) for path, leaf in flat]
    results = quantize_leaves(
        "quantize_tree",
        leaves,
        spec_or_rules,
        by_name([(path, leaf) for path, leaf in leaves if _is_dense(leaf)], axis),
        donate=donate,
        progress=progress,
        report=report,
        implementation=implementation,
    )
    return jax.tree.unflatten(treedef, results)


def quantize_leaves(
    function: str,
    leaves: Sequence[tuple[str, Any]],
    spec_or_rules: Rules,
    convention: Convention,
    *,
    donate: bool = False,
    progress: Progress = None,
    report: reports.Report | None = None,
    implementation: str | None = None,
) -> list[Any]:
    """`quantize_tree` on (path, leaf) pairs, by any convention: a leaf for each of them. `function` is for errors."""
    rules = check_rules(function, spec_or_rules)
    check_implementation(function, implementation)
    results = [leaf for _, leaf in leaves]
    if (donate or report is not None) and any(isinstance(leaf, jax.core.Tracer) for leaf in results):
        raise ValueError(f"{function}: donate and report need real arrays; under jax.jit, leave both out")
    dense = [i for i, leaf in enumerate(results) if _is_dense(leaf)]
    decisions = dict(zip(dense, decide((leaves[i] for i in dense), rules, convention), strict=True))
    jobs = [i for i in dense if decisions[i].spec is not None]
    errors: dict[int, float] = {}
    shared: dict[tuple[int, Decision], QuantizedArray] = {}
    free_after = {id(leaves[i][1]): i for i in jobs} if donate else {}
    for i in set(range(len(leaves))).difference(jobs):
        free_after.pop(id(leaves[i][1]), None)
    for i in track(function, jobs, progress, "quantize"):
        path, leaf = leaves[i]
        key = (id(leaf), decisions[i])
        if key not in shared:
            shared[key] = _convert(function, path, leaf, decisions[i], implementation)
        results[i] = shared[key]
        if report is not None:
            errors[i] = reports.relative_error(results[i], leaf)
        if free_after.get(id(leaf)) == i:
            _free(leaf, results[i])
    if report is not None:
        report.rows += _rows(leaves, results, errors, decisions)
    return results


def dequantize_tree(tree: Any, dtype: Any = None, *, implementation: str | None = None) -> Any:
    """Every QuantizedArray of a tree as a dense array, the rest as it is.

    Args:
      tree: any pytree.
      dtype: float32, float16 or bfloat16; default: per weight the dtype of its scales, bfloat16 in the float modes.
      implementation: which implementation runs it; None for the fastest of the platform.
    """
    return jax.tree.map(
        lambda leaf: dequantize(leaf, dtype, implementation=implementation) if is_quantized(leaf) else leaf,
        tree,
        is_leaf=is_quantized,
    )


def _is_dense(leaf: Any) -> bool:
    return reports.is_array(leaf) and not is_quantized(leaf)


def _convert(function: str, path: str, leaf: Any, decision: Decision, implementation: str | None) -> QuantizedArray:
    spec = decision.spec
    assert spec is not None
    qw = quantize(
        leaf,
        bits=spec.bits,
        group_size=spec.group_size,
        mode=spec.mode,
        axis=decision.axis,
        implementation=implementation,
    )
    if not isinstance(qw.scales, jax.core.Tracer):
        _refuse_poison(function, path, qw)
    return qw


def _refuse_poison(function: str, path: str, qw: QuantizedArray) -> None:
    """Raise ValueError where a group holds a NaN or an infinity, which `quantize` marks in that group's scale."""
    bad = int(_poisoned(qw.scales, spec=qw.spec))
    if bad:
        raise ValueError(
            f"{function}: {path} holds a NaN, an infinity or a range beyond its dtype, in {bad} of "
            f"{qw.scales.size} groups of {qw.group_size} along axis {qw.axis[-1]}; mend it, or leave it out by a rule"
        )


def _poisoned(scales: jax.Array, *, spec: QuantSpec) -> jax.Array:
    """How many groups have a scale that is not finite; in the float modes all ones, their NaN, stand for that."""
    if spec.is_affine:
        return jnp.sum(~jnp.isfinite(scales))
    return jnp.sum(scales == (0x7F if spec.mode == "nvfp4" else 0xFF))


def _free(leaf: Any, result: QuantizedArray) -> None:
    """Free a dense array of JAX's, once what is computed from it is there."""
    if isinstance(leaf, jax.Array):
        jax.block_until_ready(result)
        leaf.delete()


def _rows(
    leaves: Sequence[tuple[str, Any]],
    results: Sequence[Any],
    errors: dict[int, float],
    decisions: dict[int, Decision],
) -> list[reports.Row]:
    """A row per array, in the order of the tree."""
    rows = []
    for i, (path, leaf) in enumerate(leaves):
        if i in errors:
            rows.append(reports.row(path, results[i], original=leaf, error=errors[i]))
        elif is_quantized(leaf):
            rows.append(reports.row(path, leaf, note="quantized already"))
        elif reports.is_array(leaf):
            rows.append(reports.row(path, leaf, note=decisions[i].reason))
    return rows
