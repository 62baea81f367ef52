"""jaxq.save and jaxq.load, and Orbax beside them."""

import dataclasses
import json
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import same_bits

import jaxq
from jaxq.checkpoints import CheckpointError, mlx, safetensors
from jaxq.checkpoints.entries import dense


class Pair(typing.NamedTuple):
    first: object
    second: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: object
    bias: object


def quantized(**spec):
    spec = {"bits": 4, "group_size": 32, **spec}
    return jaxq.quantize(jax.random.normal(jax.random.key(0), (2, 64, 64), jnp.bfloat16), **spec)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.all(jax.tree.map(same_bits, a, b))


@pytest.mark.parametrize(
    "spec",
    [{}, {"axis": -2, "group_size": None, "bits": 8}, {"mode": "nvfp4", "group_size": 16}, {"bits": 3}],
    ids=["int4", "axis", "nvfp4", "int3"],
)
def test_a_quantized_array(tmp_path, spec):
    qw = jaxq.quantize(jax.random.normal(jax.random.key(0), (2, 64, 64)), **({"bits": 4, "group_size": 32} | spec))
    jaxq.save(tmp_path / "x.safetensors", qw)
    same(jaxq.load(tmp_path / "x.safetensors"), qw)


def test_a_tree(tmp_path):
    tree = {
        "layers": [{"w": quantized(), "b": jnp.ones(3, jnp.bfloat16)}, {"w": quantized(axis=1), "b": None}],
        "pair": (np.arange(3, dtype=np.int32), {}, [], ()),
        "names": {0: "zero", 1: 2, 2: True},
        "floats": [0.1, math.inf, -0.0, np.float64(0.1)],
    }
    jaxq.save(tmp_path / "x.safetensors", tree)
    loaded = jaxq.load(tmp_path / "x.safetensors")
    same(loaded, tree)
    assert loaded["names"] == tree["names"] and type(loaded["names"][2]) is bool
    assert list(loaded) == list(tree)
    assert isinstance(loaded["layers"][0]["w"].packed, jax.Array)


def test_keys_with_dots_do_not_collide(tmp_path):
    tree = {"a.b": jnp.zeros(1), "a": {"b": jnp.ones(1)}, "a\\": {"b": jnp.full(1, 2.0)}, "a\\.b": jnp.full(1, 3.0)}
    jaxq.save(tmp_path / "x.safetensors", tree)
    same(jaxq.load(tmp_path / "x.safetensors"), tree)


def test_nodes_of_other_classes_need_like(tmp_path):
    tree = {"p": Pair(quantized(), jnp.ones(2)), "l": Layer(quantized(axis=-2), jnp.zeros(3))}
    jaxq.save(tmp_path / "x.safetensors", tree)
    with pytest.raises(ValueError, match="pass such a tree as like"):
        jaxq.load(tmp_path / "x.safetensors")
    loaded = jaxq.load(tmp_path / "x.safetensors", like=jax.eval_shape(lambda: tree))
    assert isinstance(loaded["l"], Layer)
    same(loaded, tree)
    with pytest.raises(ValueError, match=r"differ in 1 leaves, such as 'l\.bias'"):
        jaxq.load(tmp_path / "x.safetensors", like={"p": tree["p"], "l": {"kernel": 0}})


def test_every_jax_array_sharded_or_not(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "d")
    array = jax.device_put(jnp.arange(8.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d")))
    jaxq.save(tmp_path / "x.safetensors", array)
    same(jaxq.load(tmp_path / "x.safetensors"), array)


@pytest.mark.parametrize(
    "leaf, message",
    [
        (object(), "'a.b' is a object"),
        (jax.random.key(0), "'a.b' has dtype key"),
        (jnp.ones(2, jnp.int4), "'a.b' has dtype int4"),
        (1j, "'a.b' is a complex"),
        (np.array(["x"]), "'a.b' has dtype <U1"),
        (np.array([{}]), "'a.b' has dtype object"),
    ],
    ids=["object", "key", "int4", "complex", "str", "objects"],
)
def test_what_can_not_be_saved(tmp_path, leaf, message):
    with pytest.raises(TypeError, match=message):
        jaxq.save(tmp_path / "x.safetensors", {"a": {"b": leaf}})
    assert list(tmp_path.iterdir()) == []


def test_what_mlx_holds_is_refused(tmp_path):
    pytest.importorskip("mlx.core")
    with jaxq.resident({"w.weight": quantized()}) as tree:
        with pytest.raises(TypeError, match="is held by mlx; save"):
            jaxq.save(tmp_path / "x.safetensors", tree)
        with pytest.raises(TypeError, match=r"'w\.weight' is held by mlx"):
            mlx.save(tmp_path / "m", tree)


def test_a_tracer_is_refused(tmp_path):
    with pytest.raises(TypeError, match="'w' is a tracer"):
        jax.jit(lambda w: jaxq.save(tmp_path / "x.safetensors", {"w": w}))(quantized())


# ---- files that lie


def rewritten(path, change):
    """The file, its jaxq metadata changed by `change`."""
    tensors, metadata = safetensors.read_header(path)
    described = change(json.loads(metadata["jaxq"]))
    layout = {name: tensor.struct for name, tensor in tensors.items()}
    arrays = [(name, tensor.read()) for name, tensor in tensors.items()]
    safetensors.write(path, layout, arrays, {"jaxq": json.dumps(described)})


def deep(n):
    node = {"leaf": "w"}
    for _ in range(n):
        node = {"list": [node]}
    return node


def leaves(**fields):
    return {"w": {"bits": 4, "group_size": 32, "mode": "affine", "axis": [-1]} | fields}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: [], "not of version 1"),
        (lambda d: d | {"version": 2}, "not of version 1"),
        (lambda d: d | {"leaves": []}, "no leaves"),
        (lambda d: d | {"leaves": {}}, r"'w\.\w+': is no part of the tree"),
        (lambda d: d | {"leaves": {"w": None}}, "'w': is missing"),
        (lambda d: d | {"leaves": d["leaves"] | {"v": leaves()["w"]}}, r"'v\.packed': is missing"),
        (lambda d: d | {"leaves": leaves(bits=8)}, "'w': .*scales.shape"),
        (lambda d: d | {"leaves": leaves(bits=9)}, "'w': .*bits=9"),
        (lambda d: d | {"leaves": leaves(mode={})}, "'w': its format"),
        (lambda d: d | {"leaves": leaves(axis=[-7])}, "'w': .*axis=.* is not legal"),
        (lambda d: d | {"leaves": leaves(axis=None)}, "'w': its format"),
        (lambda d: d | {"values": {"v": {"float": "x"}}}, "'v': its value"),
        (lambda d: d | {"values": {"v": {"float": "1"}}}, "'v'"),
        (lambda d: d | {"tree": {"leaf": "x"}}, "tree is damaged: the leaf 'x' is not there"),
        (lambda d: d | {"tree": {"list": [{"leaf": "w"}, {"leaf": "w"}]}}, "tree is damaged: .*twice"),
        (lambda d: d | {"tree": {"list": []}}, "tree is damaged: 1 leaves have no place"),
        (lambda d: d | {"tree": {"object": "os.system"}}, "tree is damaged: a node is"),
        (lambda d: d | {"tree": {"dict": [[None, {"leaf": "w"}]]}}, "tree is damaged: a dict has a key"),
        (lambda d: d | {"tree": {"dict": {"w": 1}}}, "tree is damaged: a node is"),
    ],
)
def test_a_description_that_lies_is_refused(tmp_path, change, message):
    path = tmp_path / "x.safetensors"
    jaxq.save(path, {"w": quantized()})
    rewritten(path, change)
    with pytest.raises(CheckpointError, match=message):
        jaxq.load(path)


def test_a_deep_tree_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    jaxq.save(path, {"w": quantized()})
    rewritten(path, lambda described: described | {"tree": deep(400)})
    jaxq.load(path)
    text = safetensors.read_header(path)[1]["jaxq"].replace('{"list": [', '{"list": [' * 500, 1)
    array = np.zeros(1, np.float32)
    safetensors.write(path, {"w": dense((1,), np.float32)}, [("w", array)], {"jaxq": text})
    with pytest.raises(CheckpointError):
        jaxq.load(path)


def test_a_models_checkpoint_is_refused(tmp_path):
    safetensors.write(tmp_path / "x.safetensors", {}, [])
    with pytest.raises(CheckpointError, match=r"jaxq\.checkpoints\.load"):
        jaxq.load(tmp_path / "x.safetensors")


# ---- Orbax


def test_orbax_saves_the_same_trees(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    tree = {"a": {"w": quantized(), "b": jnp.ones(3)}, "c": quantized(axis=-2, bits=8), "d": quantized(mode="mxfp4")}
    jaxq.save(tmp_path / "x.safetensors", tree)
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", tree)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "orbax", jax.eval_shape(lambda: tree))
    same(restored, tree)
    same(jaxq.load(tmp_path / "x.safetensors"), restored)
