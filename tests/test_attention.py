"""Attention over a cache: every implementation against NumPy in float64, and what JAX does with it.

Tolerances. Let u = 2**-24. A score, scale * sum of hd products, errs by at most (hd + 8) u scale sum |q k| (8 counts
the roundings of q * scale, its constants, and the final ones), and its distance from the largest by 2 u of both sizes
more. That is the relative error of its exponential, plus 4 u for the polynomial and, where weights are rounded to the
dtype of the cache, one such rounding: in plain JAX of a cache of 16 bits, and of many queries in bfloat16 over a cache
in bfloat16 where the instruction set has products of it. A weighted mean of T values moves by at most twice the largest
relative error of a weight, as a share of the mean of |v|; the two sums add 2 (T + 8) u of that, which covers the
rescalings of the running sums, of which there are fewer than T. Weights below 2**-125 of the largest count as none: far
below all this. The result is rounded once.
"""

from __future__ import annotations

import functools

import cpu_calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_cpu_kernels import outputs_on_one_cpu_and_on_all, rounding

import jaxq
from jaxq.attention import attention, cached_attention
from jaxq.lowerings import cpu

IMPLEMENTATIONS = ["xla", *cpu.variants()]
DTYPES = cpu_calls.DTYPES
# B, S, H, KV, hd, T, position: one and several queries a key, one and many tokens, tails of every block, both ends.
CASES = [
    (1, 1, 16, 8, 128, 600, 513),
    (2, 3, 14, 2, 64, 300, 255),
    (1, 40, 4, 1, 16, 700, 650),
    (2, 1, 6, 6, 8, 10, 0),
    (1, 1, 5, 1, 80, 1000, 999),
    (3, 2, 3, 3, 20, 9, 7),
    (1, 70, 6, 2, 32, 70, 0),
    (2, 90, 6, 2, 80, 200, 61),
    (1, 300, 8, 8, 64, 450, 130),
    (4, 130, 16, 8, 16, 140, 3),
]
# Instruction sets that multiply tiles of bfloat16 where at least so many queries share keys.
TILES, ROWS_OF_TILES = ("cpu:amx", "cpu:avx512_bf16"), 32


def operands(rng, case, dtype, cache_dtype, layers=2):
    batch, tokens, heads, groups, dim, length, _ = case
    shapes = [(batch, tokens, heads, dim), *[(batch, tokens, groups, dim)] * 2]
    caches = [(layers, batch, groups, length, dim)] * 2
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    return arrays + [rng.standard_normal(shape).astype(cache_dtype) for shape in caches]


def expected(q, k, v, cache_k, cache_v, layer, position, scale=None, weight_rounding=(0.0, 0.0)):
    """y, the bound of its error, and the caches."""
    tokens, dim = q.shape[1], q.shape[3]
    scale = dim**-0.5 if scale is None else scale
    cache_k, cache_v = cache_k.copy(), cache_v.copy()
    for cache, new in ((cache_k, k), (cache_v, v)):
        cache[layer, :, :, position : position + tokens] = new.swapaxes(1, 2).astype(cache.dtype)
    repeat = q.shape[2] // cache_k.shape[2]
    keys, values = (np.repeat(c[layer].astype(np.float64), repeat, 1) for c in (cache_k, cache_v))
    q64 = q.astype(np.float64)
    scores = scale * np.einsum("bshd,bhtd->bhst", q64, keys)
    sizes = abs(scale) * np.einsum("bshd,bhtd->bhst", np.abs(q64), np.abs(keys))
    seen = np.arange(keys.shape[2]) <= position + np.arange(tokens)[:, None]
    weights = np.where(seen, np.exp(scores - np.where(seen, scores, -np.inf).max(-1, keepdims=True)), 0)
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bhst,bhtd->bshd", weights, values)
    mean = np.einsum("bhst,bhtd->bshd", weights, np.abs(values))
    u, count = 2.0**-24, position + tokens
    each = np.where(seen, (dim + 8) * sizes + 2 * np.abs(scores), 0).max(-1)
    each = (u * (each + np.where(seen, 2 * np.abs(scores), 0).max(-1) + 4) + weight_rounding[0]).swapaxes(1, 2)
    relative, absolute = rounding(q.dtype)
    bound = (2 * each[..., None] + 2 * (count + 8) * u) * mean + relative * np.abs(y) + absolute
    return y, bound + weight_rounding[1] * count * np.abs(values).max(), cache_k, cache_v


def check(arrays, position, implementation, layer=1, scale=None):
    got = cached_attention(*arrays, layer=layer, position=position, scale=scale, implementation=implementation)
    q, k, *_, cache = arrays
    plain = implementation == "xla" and cache.dtype == q.dtype != np.float32
    rows = q.shape[1] * q.shape[2] // k.shape[2]
    tiles = implementation in TILES and cache.dtype == q.dtype == cpu_calls.DTYPES[2] and rows >= ROWS_OF_TILES
    weights = rounding(cache.dtype) if plain or tiles else (0.0, 0.0)
    y, bound, cache_k, cache_v = expected(*arrays, layer, position, scale, weights)
    assert got[0].dtype == arrays[0].dtype
    error = np.abs(np.asarray(got[0], np.float64) - y)
    assert (error <= bound).all(), f"worst {np.max(error / bound):.3g} of the bound"
    for ours, theirs in ((got[1], cache_k), (got[2], cache_v)):
        np.testing.assert_array_equal(np.asarray(ours).view(np.uint8), theirs.view(np.uint8))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values(case, implementation):
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        check(operands(rng, case, dtype, dtype), case[-1], implementation)
    check(operands(rng, case, np.float32, cpu_calls.DTYPES[2]), case[-1], implementation, layer=0, scale=0.3)
    check(operands(rng, case, cpu_calls.DTYPES[2], np.float32), case[-1], implementation, layer=0, scale=-1.5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_values_of_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups, tokens = draw(1, 4), draw(1, 20)
    position = draw(0, 600)
    dim = data.draw(st.sampled_from([1, 8, 16, 24, 64, 96, 128]))
    case = (draw(1, 2), tokens, groups * draw(1, 8), groups, dim, position + tokens + draw(0, 5), position)
    dtype, cache_dtype = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(0, 1 << 30))
    check(operands(rng, case, dtype, cache_dtype), position, data.draw(st.sampled_from(IMPLEMENTATIONS)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", cpu.variants())
def test_many_queries_and_what_is_not_a_number(implementation, dtype):
    """A NaN in a query of a prompt stays in its row; what comes after the prompt is not read."""
    case = (1, 80, 8, 4, 40, 200, 100)
    arrays = operands(np.random.default_rng(11), case, dtype, dtype)
    arrays[0][0, 33, 5] = np.nan
    arrays[3][1, :, :, 180:] = arrays[4][1, :, :, 180:] = np.nan
    y = np.asarray(cached_attention(*arrays, layer=1, position=100, implementation=implementation)[0], np.float32)
    assert np.isnan(y[0, 33, 5]).all()
    assert np.isnan(y).sum() == 40


@pytest.mark.parametrize("implementation", cpu.variants())
def test_large_scores_and_what_is_not_a_number(implementation):
    """Scores far apart leave one weight of 1; a NaN in a query stays in its row; what is not seen is not read."""
    rng = np.random.default_rng(1)
    case = (1, 1, 4, 2, 64, 700, 600)
    arrays = operands(rng, case, np.float32, np.float32)
    check(arrays, 600, implementation, scale=100.0)
    arrays[0][0, 0, 1] = np.nan
    arrays[3][1, :, :, 601:] = arrays[4][1, :, :, 601:] = np.nan
    y = np.asarray(cached_attention(*arrays, layer=1, position=600, implementation=implementation)[0])
    assert np.isnan(y[0, 0, 1]).all()
    assert np.isfinite(np.delete(y, 1, 2)).all()


def steps(q, k, v, cache_k, cache_v, position, count=3):
    """`count` steps over all layers, as a decoder has them."""

    def layer(carry, number):
        y, cache_k, cache_v, position = carry
        y, cache_k, cache_v = cached_attention(y, k, v, cache_k, cache_v, layer=number, position=position)
        return (y, cache_k, cache_v, position), None

    def step(carry):
        *rest, position, left = carry
        (*rest, position), _ = jax.lax.scan(layer, (*rest, position), jnp.arange(cache_k.shape[0]))
        return (*rest, position + 1, left - 1)

    return jax.lax.while_loop(lambda carry: carry[-1] > 0, step, (q, cache_k, cache_v, position, count))[:3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_carried_cache_is_updated_in_place(dtype):
    case = (1, 1, 8, 4, 64, 256, 100)
    arrays = [jnp.asarray(a) for a in operands(np.random.default_rng(2), case, dtype, dtype, layers=3)]
    compiled = jax.jit(steps, donate_argnums=(3, 4)).lower(*arrays, jnp.int32(100)).compile()
    memory, cache = compiled.memory_analysis(), arrays[3].nbytes
    assert memory.alias_size_in_bytes == 2 * cache
    assert memory.temp_size_in_bytes < cache / 8
    want = arrays
    for at in range(100, 103):
        for layer in range(3):
            y, *caches = cached_attention(*want, layer=layer, position=at)
            want = [y, *want[1:3], *caches]
    for ours, theirs in zip(compiled(*arrays, jnp.int32(100)), (want[0], *want[3:]), strict=True):
        np.testing.assert_array_equal(np.asarray(ours).view(np.uint8), np.asarray(theirs).view(np.uint8))


def test_grad_is_that_of_plain_jax():
    case = (2, 2, 4, 2, 16, 12, 7)
    q, k, v, *caches = operands(np.random.default_rng(3), case, np.float32, np.float32)

    def loss(implementation, q, k, v, caches):
        out = cached_attention(q, k, v, *caches, layer=1, position=7, implementation=implementation)
        return sum(jnp.sum(jnp.sin(part)) for part in out)

    ours, theirs = (
        jax.jit(jax.grad(functools.partial(loss, name), (0, 1, 2, 3)))(q, k, v, caches) for name in (None, "xla")
    )
    # The forward results differ by float32 rounding, and the derivative of sin passes that on at most as it is.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, theirs)


def test_vmap_over_everything_and_over_queries():
    case = (1, 2, 4, 2, 16, 12, 0)
    sets = [operands(np.random.default_rng(seed), case, np.float32, np.float32) for seed in range(3)]
    stacked = [np.stack(parts) for parts in zip(*sets, strict=True)]
    at = jnp.array([0, 4, 10])
    got = jax.vmap(lambda *a: cached_attention(*a[:5], layer=1, position=a[5]))(*stacked, at)
    for i, arrays in enumerate(sets):
        want = cached_attention(*arrays, layer=1, position=at[i])
        jax.tree.map(np.testing.assert_array_equal, [part[i] for part in got], list(want))
    got = jax.vmap(lambda q: cached_attention(q, *sets[0][1:], layer=0, position=3)[0])(stacked[0])
    for i, arrays in enumerate(sets):
        np.testing.assert_array_equal(got[i], cached_attention(arrays[0], *sets[0][1:], layer=0, position=3)[0])


def test_devices():
    """Partitioned by XLA over the batch, and by hand over the heads of keys."""
    case = (4, 1, 8, 4, 32, 40, 30)
    arrays = operands(np.random.default_rng(4), case, np.float32, np.float32)
    want = cached_attention(*arrays, layer=1, position=30)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    run = jax.jit(lambda *a: cached_attention(*a, layer=1, position=30))
    placed = [jax.device_put(a, NamedSharding(mesh, PartitionSpec(*[None] * (a.ndim == 5), "x"))) for a in arrays]
    jax.tree.map(np.testing.assert_array_equal, run(*placed), want)
    heads = PartitionSpec(None, None, "x")
    run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(heads,) * 5, out_specs=heads))
    jax.tree.map(np.testing.assert_array_equal, run(*arrays), want)


def test_the_choice_of_an_implementation():
    arrays = operands(np.random.default_rng(5), (1, 1, 4, 2, 64, 9, 5), np.float32, np.float32)

    def text(implementation=None):
        run = jax.jit(lambda *a: cached_attention(*a, layer=0, position=5, implementation=implementation))
        return run.lower(*arrays).as_text()

    assert "jaxq_cached_attention_cpu" in text()
    assert "jaxq_cached_attention_cpu" not in text("xla")
    with jaxq.use_implementation("xla"):
        assert "jaxq_cached_attention_cpu" not in text()
        assert "jaxq_cached_attention_cpu" in text("cpu")
    with pytest.raises(ValueError, match="implementation='cpu:mmx' can't be used"):
        text("cpu:mmx")


@pytest.mark.parametrize("isa", cpu.variants())
def test_forced_instruction_set_ran(isa):
    """Those that have nothing of their own here leave it to the next one down the list."""
    library, name = cpu_calls.library(), isa.partition(":")[2]
    order = list(cpu_calls.kernels.isas(library))
    arrays = operands(np.random.default_rng(6), (1, 1, 4, 2, 64, 9, 5), np.float32, np.float32)
    before = cpu_calls.kernels.calls(library)
    jax.block_until_ready(cached_attention(*arrays, layer=0, position=5, implementation=isa))
    after = cpu_calls.kernels.calls(library)
    ran = [other for other in order if after[other] > before[other]]
    assert len(ran) == 1
    assert order.index(ran[0]) >= order.index(name)
    assert ran[0] == name or name not in ("avx512", "avx2", "neon", "scalar")


@pytest.mark.parametrize("isa", [name for name in cpu.variants() if name in TILES])
def test_many_queries_in_bfloat16_run_on_tiles(isa):
    library, name = cpu_calls.library(), isa.partition(":")[2]
    arrays = operands(np.random.default_rng(12), (1, 70, 8, 4, 32, 80, 5), DTYPES[2], DTYPES[2])
    before = cpu_calls.kernels.calls(library)[name]
    jax.block_until_ready(cached_attention(*arrays, layer=0, position=5, implementation=isa))
    assert cpu_calls.kernels.calls(library)[name] == before + 1


_PRINT_BITS = """
import hashlib, os, sys
if sys.argv[1] == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax.numpy as jnp
import numpy as np
from jaxq.attention import cached_attention
rng = np.random.default_rng(7)
digest = hashlib.sha256()
for tokens, position, dtype in ((1, 1500, "f4"), (5, 700, "f4"), (100, 300, "f4"), (150, 300, jnp.bfloat16)):
    q, *kv = (rng.standard_normal((1, tokens, heads, 64)).astype(dtype) for heads in (8, 2, 2))
    caches = [rng.standard_normal((1, 1, 2, 2000, 64)).astype(dtype) for _ in range(2)]
    digest.update(np.asarray(cached_attention(q, *kv, *caches, layer=0, position=position)[0]).tobytes())
print(digest.hexdigest())
"""


def test_same_bits_on_one_cpu_and_on_all():
    assert len(outputs_on_one_cpu_and_on_all(_PRINT_BITS)) == 1


def test_refused_arguments():
    q, k, v, cache_k, cache_v = operands(np.random.default_rng(8), (2, 3, 4, 2, 8, 9, 0), np.float32, np.float32)

    def refused(error, match, *arrays, layer=0, position=0):
        with pytest.raises(error, match=match):
            cached_attention(*arrays, layer=layer, position=position)

    refused(TypeError, r"q.dtype=int32", q.astype(np.int32), k, v, cache_k, cache_v)
    refused(TypeError, r"k.dtype=float16 must be that of q", q, k.astype(np.float16), v, cache_k, cache_v)
    refused(TypeError, r"cache_v.dtype", q, k, v, cache_k, cache_v.astype(np.float16))
    refused(TypeError, r"layer=0.5", q, k, v, cache_k, cache_v, layer=0.5)
    refused(TypeError, r"position=", q, k, v, cache_k, cache_v, position=np.arange(2))
    refused(ValueError, r"must be \[B, S, H, hd\]", q[0], k, v, cache_k, cache_v)
    refused(ValueError, r"k and v must be", q, k[:1], v[:1], cache_k, cache_v)
    refused(ValueError, r"cache_k and cache_v must be", q, k, v, cache_k[..., :4], cache_v[..., :4])
    refused(ValueError, r"must divide the H=3 heads", q[:, :, :3], k, v, cache_k, cache_v)
    refused(ValueError, r"no room for S=3", q, k, v, cache_k[..., :2, :], cache_v[..., :2, :])


@pytest.mark.parametrize("layer, position", [(2, 0), (-1, 0), (0, 7), (0, -1)])
def test_kernels_refuse_places_outside_the_cache(layer, position):
    arrays = operands(np.random.default_rng(9), (2, 3, 4, 2, 8, 9, 0), np.float32, np.float32)
    run = jax.jit(
        lambda layer, position: cached_attention(*arrays, layer=layer, position=position, implementation="cpu")
    )
    with pytest.raises(Exception, match="is none of 2" if layer else "do not lie in a cache of 9"):
        jax.block_until_ready(run(layer, position))


def test_handler_refuses_wrong_buffers():
    q, k, v, cache_k, cache_v = operands(np.random.default_rng(10), (2, 3, 4, 2, 8, 9, 0), np.float32, np.float32)
    zero, aliases = np.int32(0), {3: 1, 4: 2}
    good = (q, k, v, cache_k, cache_v, zero, zero)

    def refused(match, place=None, value=None, results=(q, cache_k, cache_v), aliases=aliases, isa=""):
        cpu_calls.library()
        changed = [value if i == place else x for i, x in enumerate(good)]
        like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results]
        call = jax.ffi.ffi_call("test_jaxq_cached_attention_cpu", like, input_output_aliases=aliases)
        with pytest.raises(Exception, match=match):
            jax.block_until_ready(call(*changed, scale=np.float32(1), isa=isa))

    refused("not in this build", isa="mmx")
    refused("q and the cache must be", 0, q.astype(np.int32))
    refused("must be .B, S, H, hd.", 0, q[0])
    refused("k and v must have q's dtype", 1, k.astype(np.float16))
    refused("k and v must have q's dtype", 2, v[:, :, :1])
    refused("do not fit", 0, q[:, :2])
    refused("must be a multiple", 0, q[:, :, :3])
    refused("caches of keys and values must be alike", 4, cache_v[:1], (q, cache_k, cache_v[:1]))
    refused("the result must be like q", results=(q[:1], cache_k, cache_v))
    refused("must be the caches themselves", aliases={})
    refused("must be int32 scalars", 5, np.float32(0))
    refused("must be int32 scalars", 6, np.zeros(1, np.int32))


def test_plain_attention_is_causal():
    """Against the same sums, one query at a time, over the keys that it sees."""
    rng = np.random.default_rng(11)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 5, 4, 8), (1, 2, 5, 8), (1, 2, 5, 8)))
    got = attention(q, k, v, jnp.arange(5))
    for at in range(5):
        one = attention(q[:, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1], jnp.array([at]))
        np.testing.assert_allclose(
            got[:, at : at + 1], one, rtol=0, atol=1e-6
        )  # a few float32 roundings of sizes near 1
