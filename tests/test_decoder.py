"""What a decoder computes between its products: against NumPy in float64, and what JAX does with it.

Tolerances. Let u = 2**-24. A sum of D squares errs by at most (D + 2) u of itself, its root by half of that; with the
root, the quotient, two products and eps' share that is (D / 2 + 8) u of a normalized value. XLA may leave out a
rounding on the way from one float32 operation to another: the sum that plain JAX normalizes is not rounded then.
Turning adds 2 roundings of both products: 3 u of |a| + |b|, with what a and b carry. exp(-|g|) errs by u |g| from its
argument's rounding, 2 u of the constant and 8 u of the polynomial, and silu passes at most that on, with 4 roundings.
Below 2**-125 an exponential counts as none, less than the smallest normal number times |g u|. Results are rounded
once, in bits of their own dtype.
"""

from __future__ import annotations

import cpu_calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_cpu_kernels import outputs_on_one_cpu_and_on_all, rounding

import jaxq
from jaxq.decoder import add_norm, gated, split_heads
from jaxq.lowerings import cpu

IMPLEMENTATIONS = ["xla", *cpu.variants()]
DTYPES = cpu_calls.DTYPES
U = 2.0**-24


def within(got, want, bound, dtype):
    """`bound`: of the error before the last rounding."""
    assert got.dtype == dtype
    relative, absolute = rounding(dtype)
    error = np.abs(np.asarray(got, np.float64) - want)
    limit = bound * (1 + relative) + relative * np.abs(want) + absolute
    assert (error <= limit).all(), f"worst {np.max(error / limit):.3g} of the bound"


def normal(rng, shape, dtype):
    return rng.standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1024), (3, 70, 64), (2, 5, 40), (7,), (1, 300, 96)], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_add_norm(shape, implementation):
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        x, y, weights = normal(rng, shape, dtype), normal(rng, shape, dtype), normal(rng, (3, shape[-1]), np.float32)
        total, out = add_norm(x, y, weights, layer=2, eps=1e-3, implementation=implementation)
        np.testing.assert_array_equal(np.asarray(total), x + y)
        wide = (x + y).astype(np.float64)
        want = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + np.float32(1e-3)) * weights[2]
        skipped = 2 * rounding(dtype)[0] if implementation == "xla" and dtype != np.float32 else 0.0
        within(out, want, (skipped + (shape[-1] / 2 + 8) * U) * np.abs(want), dtype)


@pytest.mark.parametrize("shape", [(1, 1, 6144), (2, 9, 64), (3, 100, 88), (1, 700, 34), (1, 2)], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gated(shape, implementation):
    rng = np.random.default_rng(1)
    for dtype in DTYPES:
        x = (normal(rng, shape, np.float32) * rng.choice([1, 30], shape)).astype(dtype)
        gate, up = np.split(x.astype(np.float64), 2, -1)
        want = gate / (1 + np.exp(-gate)) * up
        bound = (np.abs(gate) + 14) * U * np.abs(want) + 2.0**-125 * np.abs(gate * up)
        within(gated(x, implementation=implementation), want, bound, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gates_far_from_zero_and_what_is_not_a_number(implementation):
    gates = np.array([-3e38, -200, -88, -0.0, 0, 88, 200, 3e38, np.nan, np.inf, 1, 1], np.float32)
    ups = np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, np.nan, np.inf], np.float32)
    got = np.asarray(gated(np.concatenate([np.tile(gates, 16), np.tile(ups, 16)]), implementation=implementation))
    want = np.tile([0, 0, 0, 0, 0, 88, 200, 3e38, np.nan, np.inf, np.nan, np.inf], 16)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-30)


# B, S, H, KV, hd, whether there are weights: vectors of every length, tails, no keys.
HEADS = [(1, 1, 16, 8, 128, True), (2, 33, 4, 2, 64, False), (1, 5, 3, 1, 20, True), (2, 3, 5, 0, 32, True)]


@pytest.mark.parametrize("case", [*HEADS, (1, 90, 6, 3, 48, True), (3, 1, 2, 2, 6, False)], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_split_heads(case, implementation):
    batch, tokens, heads, groups, dim, weighted = case
    rng = np.random.default_rng(2)
    angles = rng.uniform(0, 600, (tokens, dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    weights = [normal(rng, (2, dim), np.float32) for _ in range(2)] if weighted else []
    for dtype in DTYPES:
        x = normal(rng, (batch, tokens, heads + 2 * groups, dim), dtype)
        options = {"heads": heads, "layer": 1, "eps": 1e-2, "implementation": implementation}
        q, k, v = split_heads(x, cos, sin, *weights, **options)
        np.testing.assert_array_equal(np.asarray(v), x[:, :, heads + groups :])
        for got, part, weight in ((q, slice(heads), 0), (k, slice(heads, heads + groups), 1)):
            wide, carried = x[:, :, part].astype(np.float64), 0.0
            if weighted:
                mean = (wide * wide).mean(-1, keepdims=True)
                wide, carried = wide / np.sqrt(mean + np.float32(1e-2)) * weights[weight][1], dim / 2 + 8
            a, b = np.split(wide, 2, -1)
            c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
            want = np.concatenate([a * c - b * s, b * c + a * s], -1)
            size = np.concatenate([np.abs(a * c) + np.abs(b * s), np.abs(b * c) + np.abs(a * s)], -1)
            within(got, want, (carried + 3) * U * size, dtype)


def programs(implementation=None):
    """Each operation as a function of arrays alone, with arrays for it."""
    rng = np.random.default_rng(3)
    x, y, weights = normal(rng, (4, 2, 64), np.float32), normal(rng, (4, 2, 64), np.float32), normal(rng, (3, 64), "f4")
    heads, tables = normal(rng, (4, 2, 8, 32), np.float32), normal(rng, (2, 16), np.float32)
    norms = normal(rng, (3, 32), np.float32)
    options = {"implementation": implementation}
    return {
        "add_norm": (lambda x, y, w: add_norm(x, y, w, layer=1, eps=1e-6, **options), (x, y, weights)),
        "gated": (lambda x: (gated(x, **options),), (x,)),
        "split_heads": (
            lambda x, c, w: split_heads(x, c, c, w, w, heads=4, layer=1, **options),
            (heads, tables, norms),
        ),
    }


OPS = list(programs())


@pytest.mark.parametrize("op", OPS)
def test_grad_is_that_of_plain_jax(op):
    def gradients(implementation):
        run, arrays = programs(implementation)[op]
        loss = lambda *a: sum(jnp.sum(jnp.sin(part)) for part in run(*a))  # noqa: E731
        return jax.jit(jax.grad(loss, tuple(range(len(arrays)))))(*arrays)

    # The forward results differ by float32 rounding, and the derivative of sin passes that on at most as it is.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, gradients(None), gradients("xla"))


@pytest.mark.parametrize("op", OPS)
def test_vmap(op):
    run, arrays = programs()[op]
    axes = (0, *[0 if a.shape == arrays[0].shape else None for a in arrays[1:]])
    add_axis = [a[:, None] if axis == 0 else a for a, axis in zip(arrays, axes, strict=True)]
    got = jax.vmap(run, in_axes=axes)(*add_axis)
    for ours, theirs in zip(got, run(*arrays), strict=True):
        np.testing.assert_array_equal(np.asarray(ours)[:, 0], theirs)


@pytest.mark.parametrize("op", OPS)
def test_devices(op):
    """Partitioned by XLA over the batch, and by hand."""
    run, arrays = programs()[op]
    want = run(*arrays)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    specs = tuple(PartitionSpec("x") if a.shape[0] == 4 else PartitionSpec() for a in arrays)
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, jax.jit(run)(*placed), want)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("x"))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(sharded)(*arrays), want)


@pytest.mark.parametrize("op", OPS)
def test_the_choice_of_an_implementation(op):
    def text(implementation=None):
        run, arrays = programs(implementation)[op]
        return jax.jit(run).lower(*arrays).as_text()

    assert f"jaxq_{op}_cpu" in text()
    assert f"jaxq_{op}_cpu" not in text("xla")
    with jaxq.use_implementation("xla"):
        assert f"jaxq_{op}_cpu" not in text()
    with pytest.raises(ValueError, match="implementation='cpu:mmx' can't be used"):
        text("cpu:mmx")


_PRINT_BITS = """
import hashlib, os, sys
if sys.argv[1] == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax
import numpy as np
from jaxq.decoder import add_norm, gated, split_heads
rng = np.random.default_rng(7)
x, tables, weights = (rng.standard_normal(s).astype("f4") for s in ((1, 300, 8, 64), (300, 32), (2, 64)))
results = (add_norm(x, x, weights, eps=1e-6), gated(x), split_heads(x, tables, tables, weights, weights, heads=4))
print(hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(results))).hexdigest())
"""


def test_same_bits_on_one_cpu_and_on_all():
    assert len(outputs_on_one_cpu_and_on_all(_PRINT_BITS)) == 1


def test_refused_arguments():
    x, weights, heads = np.ones((2, 8), np.float32), np.ones((3, 8), np.float32), np.ones((1, 2, 6, 8), np.float32)
    table = np.ones((2, 4), np.float32)

    def refused(error, match, function, *arrays, **options):
        with pytest.raises(error, match=match):
            function(*arrays, **options)

    refused(TypeError, r"add_norm: x is int32", add_norm, x.astype(np.int32), x, weights, eps=0)
    refused(ValueError, r"add_norm: y is float16\[2, 8\]", add_norm, x, x.astype(np.float16), weights, eps=0)
    refused(ValueError, r"weights.shape=\(8,\)", add_norm, x, x, weights[0], eps=0)
    refused(TypeError, r"weights.dtype=int32", add_norm, x, x, weights.astype(np.int32), eps=0)
    refused(TypeError, r"layer=0.5", add_norm, x, x, weights, layer=0.5, eps=0)
    refused(ValueError, r"two halves", gated, x[:, :3])
    refused(ValueError, r"with heads=3", split_heads, heads, table, table, heads=3)
    refused(ValueError, r"cos.shape=\(2, 3\)", split_heads, heads, table[:, :3], table, heads=2)
    refused(ValueError, r"pass both", split_heads, heads, table, table, weights, heads=2)
    refused(ValueError, r"k_weights.shape", split_heads, heads, table, table, weights, weights[:, :4], heads=2)


@pytest.mark.parametrize("layer", [-1, 3])
def test_kernels_refuse_layers_that_are_not_there(layer):
    x, weights = np.ones((2, 8), np.float32), np.ones((3, 8), np.float32)
    run = jax.jit(lambda layer: add_norm(x, x, weights, layer=layer, eps=0, implementation="cpu"))
    with pytest.raises(Exception, match="is none of 3"):
        jax.block_until_ready(run(layer))


def test_handlers_refuse_wrong_buffers():
    x, weights, heads, zero = np.ones((2, 8), "f4"), np.ones((3, 8), "f4"), np.ones((1, 2, 6, 8), "f4"), np.int32(0)
    table, q, k = np.ones((2, 4), "f4"), np.ones((1, 2, 2, 8), "f4"), np.ones((1, 2, 2, 8), "f4")

    def refused(op, match, operands, results, **attributes):
        cpu_calls.library()
        like = [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in results]
        call = jax.ffi.ffi_call(f"test_jaxq_{op}_cpu", like)
        with pytest.raises(Exception, match=match):
            jax.block_until_ready(call(*operands, **({"isa": ""} | attributes)))

    eps = {"eps": np.float32(0)}
    refused("add_norm", "not in this build", (x, x, weights, zero), (x, x), isa="mmx", **eps)
    refused("add_norm", "must be float32", (x.astype("i4"), x, weights, zero), (x, x), **eps)
    refused("add_norm", "must be like x", (x, x[:1], weights, zero), (x, x), **eps)
    refused("add_norm", "must be like x", (x, x, weights, zero), (x, x[:1]), **eps)
    refused("add_norm", "a stack of weights", (x, x, weights[:, :4], zero), (x, x), **eps)
    refused("add_norm", "an int32 scalar", (x, x, weights, np.float32(0)), (x, x), **eps)
    refused("gated", "half as wide", (x,), (x,))
    refused("gated", "half as wide", (x,), (x[:1, :4],))
    refused("split_heads", "must be .B, S", (heads[0], table, table), (q, k, k), **eps)
    refused("split_heads", "the last two alike", (heads, table, table), (q, k, k[:, :1]), **eps)
    refused("split_heads", "must be .B, S", (heads, table, table), (q, k[:, :, :1], k[:, :, :1]), **eps)
    refused("split_heads", "cosines and sines", (heads, table, table[:1]), (q, k, k), **eps)
    refused("split_heads", "or none of them", (heads, table, table, weights), (q, k, k), **eps)
    refused("split_heads", "a stack of weights", (heads, table, table, weights, x[0], zero), (q, k, k), **eps)
