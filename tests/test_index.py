"""`quantized_matmul(x, qw, index=i)`: one matrix of a stack, under every transformation; against `qw[i]`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FEW_SPECS, IMPLEMENTATIONS, activations, refused, weight
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jaxq

SPEC = jaxq.QuantSpec(4, 32)
PARTITIONABLE = [name for name in IMPLEMENTATIONS if name in ("xla", "cpu")]
equal = np.testing.assert_array_equal


@pytest.fixture(params=[name for name in IMPLEMENTATIONS if ":" not in name])
def implementation(request):
    with jaxq.use_implementation(request.param):
        yield request.param


def product(x, qw, index, transpose=True):
    return jaxq.quantized_matmul(x, qw, index=index, transpose=transpose)


def close(got, expected):
    """Two orders of sums of at most 128 products of a few tens at most: 128 * 2**-24 * 128 * 4 * 4."""
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-2)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("transpose", [True, False], ids=["transpose", "plain"])
@pytest.mark.parametrize("spec", FEW_SPECS, ids=str)
def test_it_is_a_product_with_the_element(name, spec, transpose):
    if refused(name, "quantized_matmul", spec):
        return
    qw = weight(spec, (3, 24, 128)).qw
    with jaxq.use_implementation(name):
        for lead in ((), (5,), (2, 1, 3)):
            x = activations((*lead, 128 if transpose else 24))
            for i in (0, 2, -1):
                expected = jaxq.quantized_matmul(x, qw[i], transpose=transpose)
                equal(product(x, qw, i, transpose), expected)
                equal(jax.jit(product, static_argnums=3)(x, qw, i, transpose), expected)


@pytest.mark.parametrize("shape", [(3, 2, 24, 128), (3, 1, 2, 24, 128)], ids=str)
def test_elements_of_rank_three_and_more(implementation, shape):
    """Batch axes of the element broadcast against those of x."""
    qw = weight(SPEC, shape).qw
    for lead in ((5,), (2, 5), (4, 2, 5)):
        x = activations((*lead, 128))
        equal(product(x, qw, 1), jaxq.quantized_matmul(x, qw[1]))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int32"])
def test_indices_count_from_either_end_and_are_clamped(implementation, dtype):
    qw, x = weight(SPEC, (3, 24, 64)).qw, activations((2, 64))
    limits = jnp.iinfo(dtype)
    for i in {-100, -4, -3, -1, 0, 2, 3, 100, int(limits.min), int(limits.max)}:
        if limits.min <= i <= limits.max:
            at = min(max(i, -3), 2)
            equal(jax.jit(product)(x, qw, jnp.asarray(i, dtype)), x @ qw[at].T)


def test_the_axis_stays_with_the_weight(implementation):
    """`x @ qw[i]` for weights of either layout, through `transpose`."""
    dense = activations((3, 64, 32), seed=3)
    qw, x = jaxq.quantize(dense, group_size=32, axis=-2), activations((2, 64))
    equal(product(x, qw, 1), x @ qw[1])
    equal(product(x, qw.mT, 1), x @ qw[1])


def test_derivatives(implementation):
    qw, x = weight(SPEC, (3, 6, 64)).qw, activations((3, 64))

    def f(x, scales, biases, i=1):
        return product(x, jaxq.QuantizedArray(qw.packed, scales, biases, spec=SPEC), jnp.int32(i))

    # As in test_grad: the function is bilinear, so only rounding separates differences from derivatives.
    check_grads(f, (x, qw.scales, qw.biases), order=2, modes=("fwd", "rev"), eps=1e-2, atol=5e-3, rtol=5e-3)

    def loss(x, qw, i):
        return jnp.sum(jnp.sin(product(x, qw, i)))

    for i in (0, -1, 7):  # the cotangent goes to the element that was read
        at = min(i, 2)
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(x, qw, i)
        expected = jax.grad(lambda x, qw: jnp.sum(jnp.sin(x @ qw.T)), argnums=(0, 1), allow_int=True)(x, qw[at])
        close(gradient[0], expected[0])
        for got, one in zip(gradient[1].leaves[1:], expected[1].leaves[1:], strict=True):
            close(got, jnp.zeros_like(got).at[at].set(one))
        assert gradient[1].packed.dtype == jax.dtypes.float0


def test_the_backward_pass_takes_the_index_too():
    qw = weight(SPEC, (3, 6, 64)).qw
    jaxpr = jax.make_jaxpr(jax.grad(lambda x, i: jnp.sum(jnp.sin(product(x, qw, i)))))(activations((3, 64)), 1)
    shapes = [[v.aval.shape for v in e.invars] for e in jaxpr.eqns if e.primitive.name == "quantized_matmul"]
    assert len(shapes) == 2 and all(s[1] == (3, 6, 8) and s[-1] == () for s in shapes)


@pytest.mark.parametrize("spec", FEW_SPECS, ids=str)
def test_vmap(implementation, spec):
    if refused(implementation, "quantized_matmul", spec):
        return
    qw, x, i = weight(spec, (3, 24, 128)).qw, activations((4, 5, 128)), jnp.asarray([2, 0, 2, -1])
    every = jnp.stack([jaxq.quantized_matmul(x, qw[j]) for j in range(3)])  # [3, 4, 5, 24]
    close(jax.vmap(product, in_axes=(0, None, None))(x, qw, 1), every[1])
    close(jax.vmap(product, in_axes=(1, None, None), out_axes=1)(x, qw, 1), every[1])
    close(jax.vmap(product, in_axes=(None, None, 0))(x[0], qw, i), every[i, 0])
    close(jax.jit(jax.vmap(product, in_axes=(0, None, 0)))(x, qw, i), every[i, jnp.arange(4)])
    # A stack of experts for each layer, of both of which one is taken.
    experts = weight(spec, (2, 3, 24, 128), seed=2).qw
    close(jax.vmap(product, in_axes=(None, 0, None))(x[0], experts, 2), jaxq.quantized_matmul(x[0], experts[:, 2]))
    nested = jax.vmap(jax.vmap(product, in_axes=(None, None, 0)), in_axes=(None, 0, None))(x[0], experts, i)
    close(nested, jaxq.quantized_matmul(x[0], experts)[:, i])


def test_a_batch_of_x_reads_the_element_once():
    qw = weight(SPEC, (3, 24, 128)).qw
    jaxpr = jax.make_jaxpr(jax.vmap(lambda x: product(x, qw, 1)))(activations((7, 128)))
    (equation,) = [e for e in jaxpr.eqns if e.primitive.name == "quantized_matmul"]
    assert [v.aval.shape for v in equation.invars[:2]] == [(7, 128), (3, 24, 16)]


def layers(x, stack, count=4):
    return lax.scan(lambda x, i: (jnp.tanh(product(x, stack, i)), None), x, jnp.arange(count))[0]


def test_scan_over_layers(implementation):
    stack, x = weight(SPEC, (4, 64, 64)).qw, activations((3, 64))
    expected = x
    for one in stack:
        expected = jnp.tanh(expected @ one.T)
    np.testing.assert_allclose(jax.jit(layers)(x, stack), expected, rtol=1e-5, atol=1e-5)

    def sliced(x, stack):
        return lax.scan(lambda x, qw: (jnp.tanh(x @ qw.T), None), x, stack)[0]

    got, expected = (
        jax.grad(lambda x, qw, f=f: jnp.sum(f(x, qw)), argnums=(0, 1), allow_int=True)(x, stack)
        for f in (jax.checkpoint(layers), sliced)
    )
    for one, other in zip((got[0], *got[1].leaves[1:]), (expected[0], *expected[1].leaves[1:]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name == "cpu"])
def test_nothing_of_the_stack_is_copied(implementation):
    """Not by the loop, which would hold a slice, nor around it."""
    stack, x = weight(SPEC, (8, 256, 256)).qw, activations((1, 256))
    with jaxq.use_implementation(implementation):
        compiled = jax.jit(layers, static_argnums=2).lower(x, stack, 8).compile()
    sliced = re.findall(r"(\w+)\[[\d,]*\]\S* dynamic-slice\(", compiled.as_text())
    assert set(sliced) <= {"s32"}  # the number of the layer
    assert compiled.memory_analysis().temp_size_in_bytes < stack[0].nbytes


def test_dispatch_leaves_it_alone():
    """Also under `jax.checkpoint`, whose policy then sees every product as the dot that it stands for."""
    stack, x = weight(SPEC, (4, 64, 64)).qw, activations((3, 64))
    seen = []

    def policy(primitive, *avals, **params):
        seen.append((primitive.name, [aval.shape for aval in avals]))
        return jax.checkpoint_policies.dots_saveable(primitive, *avals, **params)

    block = jax.checkpoint(lambda x, w: jnp.sin(product(x, stack, 1)) @ w, policy=policy)

    def loss(x, w):
        return jnp.sum(block(x, w) ** 2)

    expected = jax.grad(loss)(x, stack[0].T.dequantize())
    seen.clear()
    close(jax.grad(jaxq.dispatch(loss, fallback="error"))(x, stack[0].T), expected)
    assert seen.count(("dot_general", [(3, 64), (64, 8)])) >= 2
    assert "quantized_matmul" not in {name for name, _ in seen}


def test_resident_weights():
    if "mlx" not in IMPLEMENTATIONS:
        pytest.skip("needs mlx")
    stack, x = weight(SPEC, (4, 64, 64)).qw, activations((3, 64))
    with jaxq.resident(stack) as held:
        np.testing.assert_allclose(jax.jit(layers)(x, held), layers(x, stack), rtol=1e-5, atol=1e-5)


def test_mps_cuts_the_element_out_and_calls_as_ever():
    """The call of jax-mps stands as it does for a weight by itself, behind slices of the leaves."""
    stack = jax.eval_shape(lambda w: jaxq.quantize(w), jax.ShapeDtypeStruct((3, 128, 256), "bfloat16"))
    x = jax.ShapeDtypeStruct((2, 256), "bfloat16")
    texts = []
    for f, args in (
        (product, (x, stack, jax.ShapeDtypeStruct((), "int32"))),
        (jaxq.quantized_matmul, (x, stack_of(stack))),
    ):
        text = jax.jit(f).trace(*args).lower(lowering_platforms=("mps",)).as_text()
        (call,) = [line for line in text.splitlines() if "custom_call" in line]
        texts.append((re.sub(r"%\w+", "%", call).strip(), text.count("dynamic_slice ")))
    assert texts[0][0].partition("@mps")[2] == texts[1][0].partition("@mps")[2]
    assert texts[0][1] and not texts[1][1]


def stack_of(stack):
    return jax.eval_shape(lambda qw: qw[0], stack)


# ---- several devices


def put(mesh, tree, *spec):
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


def collectives(f, *args):
    text = jax.jit(f).lower(*args).compile().as_text()
    return sorted(re.findall(r"= \S+ (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", text))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("implementation", PARTITIONABLE)
@pytest.mark.parametrize(
    ("x_spec", "w_spec", "transpose", "expected"),
    [
        (("data", None), ("model", None), True, []),
        (("data", None), (None, None), True, []),
        (("data", "model"), (None, "model"), True, ["all-reduce"]),
        ((None, None), (None, "model"), False, []),
        ((None, "model"), ("model", None), False, ["all-reduce"]),
    ],
    ids=["column", "batch", "row", "plain column", "plain row"],
)
def test_partition(x_spec, w_spec, transpose, expected, implementation, axis_type):
    """As `test_partition.test_matmul` has it for a weight by itself."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    qw, x = weight(SPEC, (3, 32, 512)).qw, activations((8, 512 if transpose else 32))
    args = put(mesh, x, *x_spec), put(mesh, qw, None, *w_spec), jnp.int32(1)

    def f(x, qw, i):
        return jaxq.quantized_matmul(x, qw, index=i, transpose=transpose, implementation=implementation)

    if expected and axis_type is AxisType.Explicit:
        with pytest.raises(ValueError, match="the contracted axis is partitioned"):
            jax.jit(f)(*args)
        return
    np.testing.assert_allclose(
        jax.jit(f)(*args), jaxq.quantized_matmul(x, qw[1], transpose=transpose), rtol=1e-5, atol=1e-3
    )
    assert collectives(f, *args) == expected


@pytest.mark.parametrize("implementation", PARTITIONABLE)
def test_a_stack_split_along_its_own_axis(implementation):
    qw, x = weight(SPEC, (4, 32, 128)).qw, activations((8, 128))
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    with jaxq.use_implementation(implementation):
        close(jax.jit(product)(x, put(mesh, qw, "i"), 1), x @ qw[1].T)
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    with pytest.raises(ValueError, match="the indexed axis is partitioned over mesh axis 'i'"):
        jax.jit(product)(x, put(mesh, qw, "i"), 1)


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if ":" not in name])
def test_shard_map(implementation):
    """An index that differs between devices reads other layers on each."""
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    qw, x = weight(SPEC, (4, 32, 128)).qw, activations((8, 128))

    def local(x, qw):
        return product(x, qw, lax.axis_index("i"))[None]

    with jaxq.use_implementation(implementation):
        y = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P()), out_specs=P("i")))(x, qw)
        close(y, jaxq.quantized_matmul(x, qw))
