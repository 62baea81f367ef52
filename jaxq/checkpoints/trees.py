"""`jaxq.save` and `jaxq.load`: any tree of arrays and QuantizedArrays in one safetensors file.

A leaf is named by its path, `params.layers.0.kernel`; a QuantizedArray is `<path>.packed`, `.scales` and `.biases`.
The tree's structure and the formats stand in the file's metadata under "jaxq", in JSON:

    {"version": 1, "leaves": {"<path>": {"bits": 4, "group_size": 64, "mode": "affine", "axis": [-1]} or null},
     "tree": {"dict": [["params", {"list": [{"leaf": "<path>"}, ...]}], ...]} or null,
     "values": {"<path>": 1}}

Any safetensors reader sees the tensors; nothing in the file is code.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from jaxq.array import QuantizedArray, is_quantized
from jaxq.checkpoints import safetensors
from jaxq.checkpoints.entries import Checkpoint, Entry, dense
from jaxq.checkpoints.files import parse_json, refuse
from jaxq.checkpoints.safetensors import DTYPES, Tensor
from jaxq.spec import Mode, QuantSpec

_KEY = "jaxq"
_VERSION = 1
# Leaves that stand in the metadata. By their exact class: NumPy's float64 is a float too.
_VALUES = (bool, int, float, str)


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Save a tree to a safetensors file, which appears under its name only when it is whole.

    Args:
      path: the file.
      tree: a pytree. Leaves: JAX and NumPy arrays, QuantizedArrays, and Python's bool, int, float and str. Dicts with
        keys of str or int, lists, tuples and None come back as they are; for other nodes `load` needs `like`.

    Raises:
      TypeError: a leaf that can't be saved, by its path.
      ValueError: two leaves of one path.
    """
    leaves = _named_leaves("save", tree)
    arrays = {name: leaf for name, leaf in leaves.items() if type(leaf) not in _VALUES}
    layout = dict(itertools.chain.from_iterable(_parts(name, leaf) for name, leaf in arrays.items()))
    described = {
        "version": _VERSION,
        "leaves": {name: _describe_leaf(leaf) for name, leaf in arrays.items()},
        "tree": _describe(tree, ()),
        "values": {name: _describe_value(leaf) for name, leaf in leaves.items() if name not in arrays},
    }
    stream = itertools.chain.from_iterable(_stored(name, leaf) for name, leaf in arrays.items())
    safetensors.write(path, layout, stream, {_KEY: json.dumps(described, separators=(",", ":"))})


def load(path: str | os.PathLike[str], *, like: Any = None) -> Any:
    """Load what `save` saved.

    Args:
      path: the file.
      like: a tree of the same structure, its leaves of any kind (abstract ones will do), for a tree with nodes of
        classes of your own. A QuantizedArray in it stands for one leaf.

    Returns:
      The tree, its arrays on JAX's default device; a 64-bit one is NumPy's unless JAX's 64-bit types are enabled.

    Raises:
      CheckpointError: a file that is not well-formed, or was not written by `save`.
      ValueError: a tree of classes of your own without `like`, or a `like` with other leaves.
    """
    path = Path(path)
    tensors, metadata = safetensors.read_header(path)
    if _KEY not in metadata:
        raise refuse(path, "was not written by jaxq.save; jaxq.checkpoints.load reads models' checkpoints")
    described, entries, values = _read_description(path, tensors, metadata)
    names = list(itertools.chain(entries, values))
    if like is None and described.get("tree") is None:
        raise ValueError(f"load: {path} holds a tree with nodes of classes of your own; pass such a tree as like")
    if like is not None:
        structure = jax.tree.structure(like, is_leaf=is_quantized)
        wanted = list(_named_leaves("load", like, check=False))
        if set(wanted) != set(names):
            odd = sorted(set(wanted) ^ set(names))
            raise ValueError(f"load: like and {path} differ in {len(odd)} leaves, such as {odd[0]!r}")

    @functools.cache
    def leaf(name: str) -> Any:
        return values[name] if name in values else entries[name].place(entries[name].read())

    if like is not None:
        return jax.tree.unflatten(structure, [leaf(name) for name in wanted])
    try:
        return _rebuild(described["tree"], set(names), leaf)
    except (_BadTree, RecursionError) as error:
        raise refuse(path, f"its tree is damaged: {error}") from None


def open_if_saved(path: Path) -> Checkpoint | None:
    """A file that `save` wrote as a checkpoint: its arrays by their paths, without the tree. None for any other file.

    Raises:
      CheckpointError: a file that is not well-formed.
    """
    tensors, metadata = safetensors.read_header(path)
    if _KEY not in metadata:
        return None
    _, entries, _ = _read_description(path, tensors, metadata)
    return Checkpoint(path, "jaxq", {}, entries)


# ---- names


def _named_leaves(function: str, tree: Any, *, check: bool = True) -> dict[str, Any]:
    """{path: leaf}, in JAX's order of leaves."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)[0]:
        name = _name(path)
        if name in leaves:
            raise ValueError(f"{function}: two leaves have the path {name!r}; rename a key")
        if check:
            _check_leaf(name, leaf)
        leaves[name] = leaf
    return leaves


def _name(path: Sequence[Any]) -> str:
    """`a.0.b`; a dot within a key is escaped, so that no two paths have one name."""
    keys = (str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
    return ".".join(key.replace("\\", "\\\\").replace(".", "\\.") for key in keys)


def _check_leaf(name: str, leaf: Any) -> None:
    if type(leaf) in _VALUES:
        return
    if isinstance(leaf, QuantizedArray) and leaf.spec.held_by is not None:
        raise TypeError(f"save: the data of {name!r} is held by {leaf.spec.held_by}; save the tree it was made from")
    for array in leaf.leaves if isinstance(leaf, QuantizedArray) else (leaf,):
        if isinstance(array, jax.core.Tracer):
            raise TypeError(f"save: the leaf {name!r} is a tracer; save outside jit")
        if not isinstance(array, jax.Array | np.ndarray | np.generic):
            raise TypeError(f"save: the leaf {name!r} is a {type(array).__name__}; convert it to an array")
        if array.dtype not in DTYPES.values():
            raise TypeError(f"save: the leaf {name!r} has dtype {array.dtype}; safetensors has {', '.join(DTYPES)}")


def _part_names(name: str, spec: QuantSpec) -> list[str]:
    return [f"{name}.{part}" for part in (("packed", "scales", "biases") if spec.is_affine else ("packed", "scales"))]


def _stored(name: str, leaf: Any) -> Iterator[tuple[str, Any]]:
    """The file's tensors for a leaf."""
    if isinstance(leaf, QuantizedArray):
        return zip(_part_names(name, leaf.spec), leaf.leaves, strict=True)
    return iter([(name, leaf)])


def _parts(name: str, leaf: Any) -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
    return ((part, dense(array.shape, array.dtype)) for part, array in _stored(name, leaf))


# ---- descriptions


def _describe_leaf(leaf: Any) -> dict[str, Any] | None:
    if not isinstance(leaf, QuantizedArray):
        return None
    return {"bits": leaf.bits, "group_size": leaf.group_size, "mode": leaf.mode, "axis": list(leaf.axis)}


def _describe_value(value: Any) -> Any:
    return {"float": value.hex()} if isinstance(value, float) else value  # JSON has no infinity and no NaN


def _describe(tree: Any, path: tuple[Any, ...]) -> Any:
    """The structure as JSON; None where a node is of another class than dict, list and tuple."""
    if tree is None:
        return {"none": True}
    if type(tree) is dict and all(type(key) in (str, int) for key in tree):
        children = [[key, _describe(child, (*path, jax.tree_util.DictKey(key)))] for key, child in tree.items()]
        return None if any(child is None for _, child in children) else {"dict": children}
    if type(tree) in (list, tuple):
        nodes = [_describe(child, (*path, jax.tree_util.SequenceKey(i))) for i, child in enumerate(tree)]
        return None if None in nodes else {type(tree).__name__: nodes}
    is_leaf = is_quantized(tree) or jax.tree_util.all_leaves([tree])
    return {"leaf": _name(path)} if is_leaf else None


class _BadTree(Exception):
    """A description that `_describe` does not give."""


def _rebuild(node: Any, names: set[str], leaf: Any) -> Any:
    """The inverse of `_describe`. Every name of `names` once."""
    tree = _rebuild_node(node, names, leaf)
    if names:
        raise _BadTree(f"{len(names)} leaves have no place in it, such as {next(iter(names))!r}")
    return tree


def _rebuild_node(node: Any, names: set[str], leaf: Any) -> Any:
    if not isinstance(node, dict) or len(node) != 1:
        raise _BadTree(f"a node is {str(node)[:100]}")
    ((kind, value),) = node.items()
    if kind == "none":
        return None
    if kind == "leaf" and isinstance(value, str):
        if value not in names:
            raise _BadTree(f"the leaf {value[:100]!r} is not there, or stands there twice")
        names.remove(value)
        return leaf(value)
    if kind in ("list", "tuple") and isinstance(value, list):
        children = [_rebuild_node(child, names, leaf) for child in value]
        return children if kind == "list" else tuple(children)
    if kind == "dict" and isinstance(value, list) and all(isinstance(v, list) and len(v) == 2 for v in value):
        if not all(type(key) in (str, int) for key, _ in value):
            raise _BadTree("a dict has a key that is neither str nor int")
        return {key: _rebuild_node(child, names, leaf) for key, child in value}
    raise _BadTree(f"a node is {str(node)[:100]}")


def _read_description(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Entry], dict[str, Any]]:
    """The description, and the arrays and the Python values by it, checked against the tensors; nothing is read."""
    described = parse_json(path, metadata[_KEY].encode())
    if not isinstance(described, dict) or described.get("version") != _VERSION:
        raise refuse(path, f"its jaxq metadata are not of version {_VERSION}")
    leaves, values = described.get("leaves"), described.get("values")
    if not isinstance(leaves, dict) or not isinstance(values, dict) or "tree" not in described:
        raise refuse(path, "its jaxq metadata hold no leaves or no tree")
    entries = {name: _entry(path, name, fields, tensors) for name, fields in leaves.items()}
    used = {part for name, entry in entries.items() for part, _ in _parts(name, entry.abstract)}
    if unused := next((name for name in tensors if name not in used), None):
        raise refuse(path, "is no part of the tree that the metadata describe", unused)
    return described, entries, {name: _value(path, name, value) for name, value in values.items()}


def _entry(path: Path, name: str, fields: Any, tensors: Mapping[str, Tensor]) -> Entry:
    if fields is None:
        if name not in tensors:
            raise refuse(path, "is missing", name)
        return tensors[name].entry
    if not isinstance(fields, dict) or set(fields) != {"bits", "group_size", "mode", "axis"}:
        raise refuse(path, f"its format is said to be {str(fields)[:100]}", name)
    axis = fields["axis"]
    if not isinstance(axis, list) or not all(type(a) is int for a in axis) or not isinstance(fields["mode"], str):
        raise refuse(path, f"its format is said to be {str(fields)[:100]}", name)
    try:
        spec = QuantSpec(fields["bits"], fields["group_size"], cast(Mode, fields["mode"]))
        missing = next((part for part in _part_names(name, spec) if part not in tensors), None)
        if missing:
            raise refuse(path, "is missing", missing)
        parts = [tensors[part] for part in _part_names(name, spec)]
        abstract = QuantizedArray.from_packed(*(part.struct for part in parts), **fields)
    except (TypeError, ValueError) as error:
        raise refuse(path, str(error), name) from None
    return Entry(abstract, str(spec), sum(part.nbytes for part in parts), lambda: [part.read() for part in parts])


def _value(path: Path, name: str, value: Any) -> Any:
    if isinstance(value, bool | int | str):
        return value
    try:
        return float.fromhex(value["float"])
    except (TypeError, KeyError, ValueError, OverflowError):
        raise refuse(path, f"its value is said to be {str(value)[:100]}", name) from None
