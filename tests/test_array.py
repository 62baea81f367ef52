"""`QuantizedArray`: what it looks like, how JAX's trees see it, indexing, and what it refuses."""

import copy
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import SPECS, dense, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import jaxq

SPEC = jaxq.QuantSpec(4, 32)


@pytest.fixture
def qw():
    return weight(SPEC, (12, 128)).qw


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_logical_shape_and_dtype(spec):
    w = jnp.ones((6, 256), jnp.bfloat16)
    abstract = jax.eval_shape(lambda w: jaxq.quantize(w, bits=spec.bits, group_size=spec.group_size, mode=spec.mode), w)
    concrete = jaxq.quantize(w, bits=spec.bits, group_size=spec.group_size, mode=spec.mode)
    for qw in (abstract, concrete):
        assert isinstance(qw, jaxq.QuantizedArray)
        assert (qw.shape, qw.ndim, qw.size, qw.dtype) == ((6, 256), 2, 6 * 256, spec.dtype)
        assert (qw.bits, qw.group_size, qw.mode) == (spec.bits, spec.group_size, spec.mode)
        per_group = 4 if spec.is_affine else 1
        assert qw.nbytes == 6 * 256 * spec.bits // 8 + 6 * 256 // spec.group_size * per_group
    assert concrete.float_dtype == ml_dtypes.bfloat16


def test_eval_shape_prints_the_logical_type():
    assert "int4[512, 4096]" in repr(jax.eval_shape(jaxq.quantize, jnp.ones((512, 4096))))


def test_repr(qw):
    assert repr(qw) == "QuantizedArray(int4[12, 128], 1152 bytes, bits=4, group_size=32, mode='affine')"
    assert "axis=-2" in repr(qw.T)


def test_jaxpr_is_readable(qw):
    text = str(
        jax.make_jaxpr(lambda w, x: x @ jaxq.quantize(w, group_size=32).T)(jnp.ones((12, 128)), jnp.ones((3, 128)))
    )
    assert "quantize[" in text and "quantized_matmul[" in text and "spec=int4g32" in text


def test_transposes_move_no_data(qw):
    assert qw.T.shape == (128, 12) and qw.T.packed is qw.packed
    assert qw.T.T.axis == qw.axis and qw.mT.axis == (-2,)
    assert qw.swapaxes(0, 1).shape == (128, 12) and qw.swapaxes(-1, -1) is qw
    stack = weight(SPEC, (3, 12, 128)).qw
    assert stack.mT.shape == (3, 128, 12)
    with pytest.raises(ValueError, match=r"use \.mT for stacks"):
        _ = stack.T
    with pytest.raises(ValueError, match="not the last two"):
        stack.swapaxes(0, 1)


def test_immutable_and_compares_by_identity(qw):
    with pytest.raises(AttributeError, match="immutable"):
        qw.scales = None
    assert qw == qw and qw != copy.copy(qw) and len({qw, qw}) == 1


# ---- trees


@pytest.mark.parametrize("leaf", [None, True, object(), jax.ShapeDtypeStruct((2,), np.float32), 0])
def test_any_leaf_survives_a_tree_map(qw, leaf):
    out = jax.tree.map(lambda _: leaf, qw)
    assert isinstance(out, jaxq.QuantizedArray)
    repr(out)
    if not hasattr(leaf, "shape"):
        assert not hasattr(out, "shape")


def test_key_paths(qw):
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path({"w": qw})]
    assert paths == ["['w'].packed", "['w'].scales", "['w'].biases"]


def test_float_modes_have_two_leaves():
    assert len(jax.tree.leaves(weight(jaxq.QuantSpec(mode="mxfp4"), (4, 64)).qw)) == 2


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_copies(qw, duplicate):
    other = duplicate(qw.T)
    assert jax.tree.structure(other) == jax.tree.structure(qw.T)
    jax.tree.map(np.testing.assert_array_equal, other, qw.T)


def test_device_put_carries_the_whole_array(qw):
    device = jax.devices()[1]
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(jax.device_put(qw, device)))
    mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, PartitionSpec("rows", None))
    moved = jax.device_put(qw, sharding)
    assert moved.sharding == sharding and moved.scales.sharding == sharding


# ---- indexing


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_indexing_is_numpys(data):
    """Every index that is allowed gives what it gives on the dense array."""
    shape, axis = data.draw(st.sampled_from([((6, 64), -1), ((64, 6), -2), ((3, 6, 64), -1), ((3, 64, 6), -2)]))
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    qw = jaxq.quantize(w, group_size=32, axis=axis)
    reference = np.asarray(jaxq.dequantize(qw))
    index = []
    array_used = False
    for size in shape:
        if size == 64:
            index.append(slice(None))
            continue
        kinds = ["int", "slice", "full"] + ([] if array_used else ["array"])
        kind = data.draw(st.sampled_from(kinds))
        if kind == "int":
            index.append(data.draw(st.integers(-size, size - 1)))
        elif kind == "slice":
            index.append(slice(data.draw(st.integers(0, size)), data.draw(st.integers(0, size)), None))
        elif kind == "full":
            index.append(slice(None))
        else:
            array_used = True
            index.append(np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4))))
    index = tuple(index)
    if array_used and any(isinstance(i, int) for i in index):
        with pytest.raises(IndexError, match="in two steps"):
            qw[index]
        return
    out = qw[index]
    out = jaxq.dequantize(out) if jaxq.is_quantized(out) else out
    np.testing.assert_array_equal(out, reference[index])


def test_rows_are_dense_and_slices_are_quantized(qw):
    ids = jnp.array([[1, 5, 1], [0, 11, 2]])
    assert isinstance(qw[3], jax.Array) and qw[3].shape == (128,)
    np.testing.assert_allclose(qw[ids], dense(qw)[np.asarray(ids)], rtol=1e-5, atol=1e-5)
    assert jaxq.is_quantized(qw[2:7]) and qw[2:7].shape == (5, 128)
    assert jaxq.is_quantized(qw[...]) and qw.T[:, 3].shape == (128,)


@pytest.mark.parametrize("ids", [3, [2, 0], np.array([[1, 5, 1], [0, 11, 2]])])
def test_take_rounds_once_to_the_dtype_asked_for(qw, ids):
    narrow = jax.tree.map(lambda leaf: leaf if leaf.dtype == jnp.uint32 else leaf.astype(jnp.bfloat16), qw)
    for dtype in (jnp.float32, jnp.float16):
        rows = jax.jit(lambda qw, dtype=dtype: qw.take(ids, dtype))(narrow)
        assert rows.dtype == dtype
        np.testing.assert_array_equal(rows, jaxq.dequantize(narrow, dtype)[jnp.asarray(ids)])
    assert narrow.take(ids).dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow.take(ids), narrow[ids])
    np.testing.assert_array_equal(narrow.T.take(ids), narrow.T[:, ids])


def test_take_of_a_stack():
    stack = weight(SPEC, (3, 12, 128)).qw
    np.testing.assert_array_equal(stack.take([4, 0], jnp.float32), jaxq.dequantize(stack, jnp.float32)[:, [4, 0]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rows_have_the_derivatives_of_dense_ones(qw, dtype):
    """By the scales, whose narrow dtypes are looked up as bits: those of rows taken after dequantization."""
    ids = jnp.array([[1, 5], [1, -2]])
    scales, biases = (leaf.astype(dtype) for leaf in (qw.scales, qw.biases))

    def rows(look_up):
        def function(scales, biases):
            return look_up(jaxq.QuantizedArray.from_packed(qw.packed, scales, biases, bits=4, group_size=32))

        return function

    ours = rows(lambda qw: qw.take(ids, jnp.float32))
    reference = rows(lambda qw: jaxq.dequantize(qw, jnp.float32)[ids])
    out, pull = jax.vjp(ours, scales, biases)
    expected, pull_reference = jax.vjp(reference, scales, biases)
    np.testing.assert_array_equal(out, expected)
    # Whole numbers up to 3, summed over 32 places with codes up to 15 and twice for row 1, are at most 2**11.5, but
    # bfloat16 has 8 bits: a rounding for each of the two sums.
    g = jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape) % 4
    for mine, theirs in zip(pull(g), pull_reference(g), strict=True):
        assert mine.dtype == dtype
        eps = 2 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs.astype(jnp.float32), rtol=eps)
    tangents = jnp.ones_like(scales), jnp.ones_like(biases)
    mine, theirs = (jax.jvp(f, (scales, biases), tangents)[1] for f in (ours, reference))
    np.testing.assert_allclose(mine, theirs, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rows_looked_up_in_a_loop_leave_the_table_alone(dtype):
    """No copy of the scales, wider or as bits, is made: the program needs less memory of its own than one takes."""
    table = jaxq.quantize(jnp.ones((4096, 256), dtype), bits=4, group_size=32)

    def sum_of_rows(table, tokens):
        return jax.lax.scan(
            lambda total, token: (total + table.take(token, jnp.float32).sum(), None), jnp.float32(0), tokens
        )[0]

    compiled = jax.jit(sum_of_rows).lower(table, jnp.zeros((64, 1), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < table.scales.nbytes


def test_wrong_uses_of_take(qw):
    for ids in (slice(2), None, ..., (1, 2)):
        with pytest.raises(TypeError, match="take: ids="):
            qw.take(ids)
    with pytest.raises(TypeError, match="dtype=int32"):
        qw.take(1, jnp.int32)
    with pytest.raises(IndexError, match="out of range"):
        qw.take(12)


def test_only_the_rows_read_are_dequantized(qw):
    jaxpr = jax.make_jaxpr(lambda qw, ids: qw[ids])(qw, jnp.array([1, 2]))
    (equation,) = [e for e in jaxpr.eqns if e.primitive.name == "dequantize"]
    assert equation.outvars[0].aval.shape == (2, 128)


def test_iteration_and_length():
    stack = weight(SPEC, (3, 12, 128)).qw
    assert len(stack) == 3 and [layer.shape for layer in stack] == [(12, 128)] * 3


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ((slice(None), 3), "axis 1 of shape .12, 128. is grouped"),
        ((slice(None), slice(0, 64)), "is grouped"),
        (12, "out of range for axis 0 of length 12"),
        ((0, 0, 0), "3 indices for shape"),
        (None, "None and more than one Ellipsis"),
        (np.array([1.0]), "indexed by float"),
        (np.array([True] * 12), "indexed by bool"),
    ],
)
def test_index_errors(qw, index, message):
    with pytest.raises(IndexError, match="QuantizedArray: .*" + message):
        qw[index]


# ---- what it is not


@pytest.mark.parametrize(
    "use",
    [
        lambda x, q: jnp.dot(x, q),
        lambda x, q: jax.lax.dot(x, q.T),
        lambda x, q: jnp.asarray(q),
        lambda x, q: np.asarray(q),
        lambda x, q: q + 1,
        lambda x, q: 1 - q,
        lambda x, q: np.ones(3) * q,
        lambda x, q: x * q,
        lambda x, q: -q,
        lambda x, q: q < 1,
    ],
)
def test_other_uses_say_what_to_do_instead(qw, use):
    with pytest.raises(TypeError, match=r"jaxq\.dispatch, or call qw\.dequantize\(\)"):
        use(jnp.ones((3, 128)), qw)
