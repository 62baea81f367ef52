"""Data goes one way, frameworks stay in their leaves, and JAX's internals in one file: read from the sources alone."""

from __future__ import annotations

import ast
import functools
import json
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "jaxq"
FILES = sorted(PACKAGE.rglob("*.py"))

# unit -> the units of jaxq that it may import. One without a row may import everything but a leaf.
MAY_IMPORT = {
    "spec": set(),
    "_compat": set(),
    "packing": {"spec"},
    "array": {"spec"},
    "indexing": {"spec", "array"},
    "primitives": {"spec", "packing", "array", "_compat"},
    "kernels": {"spec"},
    "lowerings": {"spec", "packing", "_compat", "primitives", "kernels"},
}
# A method of the array that is an operation imports it when it is called; nothing else looks upwards.
INSIDE_FUNCTIONS = {"array": {"indexing", "primitives"}}
LEAVES = {"integrations", "checkpoints", "cli"}
# Leaves that others may import, and what of them: the public names, and the command line over everything.
ABOVE_LEAVES = {"__init__", "__main__", "cli"}

# Every third-party package beyond the core dependencies, and the only files that may import it.
CORE = {"jax", "jaxlib", "numpy", "ml_dtypes"}
HOMES = {
    "mlx": ("lowerings/mlx.py",),
    "flax": ("integrations/flax.py",),
    "equinox": ("integrations/equinox.py",),
    "gguf": ("checkpoints/",),
    "safetensors": ("checkpoints/",),
    "tqdm": ("progress.py",),
    "rich": ("progress.py", "cli"),
    "typer": ("cli",),
}


def unit(path: pathlib.Path) -> str:
    """The name under which a file stands in the tables: its top folder, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def imports(path: pathlib.Path) -> list[tuple[str, bool]]:
    """Every module that a file imports, dotted and absolute, and whether inside a function."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from jaxq import packing` imports jaxq.packing; of others the module is enough.
            ours = node.module == "jaxq"
            found.extend((f"{node.module}.{alias.name}" if ours else node.module, inside) for alias in node.names)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return  # annotations only
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(path.read_text()), False)
    return found


def ids(path: pathlib.Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_data_goes_one_way(path):
    own = unit(path)
    others = {child.stem for child in PACKAGE.iterdir()} - LEAVES
    for name, inside in imports(path):
        if name.split(".")[0] != "jaxq" or name == "jaxq":
            continue
        other = name.split(".")[1]
        allowed = MAY_IMPORT.get(own, others) | (INSIDE_FUNCTIONS.get(own, set()) if inside else set())
        if own in ABOVE_LEAVES:
            continue
        assert other == own or other in allowed, f"{own} may not import {name}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_nothing_imports_the_public_names(path):
    """Inside the package a name has one home; `import jaxq` would be a circle."""
    if unit(path) not in {"cli", "__main__"}:
        assert "jaxq" not in {name for name, _ in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_frameworks_stay_at_home(path):
    for name, _ in imports(path):
        package = name.split(".")[0]
        if package in CORE or package == "jaxq" or package in sys.stdlib_module_names:
            continue
        assert package in HOMES, f"{name} is in no extra that this test knows"
        assert ids(path).startswith(HOMES[package]), f"{name} may be imported only in {HOMES[package]}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_jax_internals_stay_in_one_file(path):
    if ids(path) == "_compat.py":
        return
    tree = ast.parse(path.read_text())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "_src" not in attributes
    assert not [name for name, _ in imports(path) if "_src" in name.split(".")]


def test_import_needs_the_core_dependencies_alone():
    """`import jaxq` in a fresh interpreter brings in no package of an extra, nor one that tests alone need."""
    code = "import json, sys, jaxq; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(result.stdout)}
    assert "jaxq" in loaded
    assert not loaded & (set(HOMES) | {"pytest", "hypothesis", "sklearn", "matplotlib"})


def test_primitives_do_not_know_where_they_run():
    """An operation without its lowerings still has a meaning: shapes, derivatives, batching."""
    code = (
        "import sys; import jax, jax.numpy as jnp\n"
        "import types; package = types.ModuleType('jaxq'); package.__path__ = sys.argv[1:]\n"
        "sys.modules['jaxq'] = package\n"
        "from jaxq.primitives.quantize import quantize\n"
        "print(jax.eval_shape(quantize, jnp.zeros((4, 64))).shape)\n"
        "assert 'jaxq.lowerings' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code, str(PACKAGE)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "(4, 64)\n"
