"""The CPU kernels through their FFI handlers: every instruction set that this machine has, on every format.

The oracle is NumPy in float64. Tolerances: a sum of n float32 products in any order errs by at most
(n + c) * 2**-24 * sum(|terms|), where the terms of a group are x*scale*code and x*bias (c = 8 counts the products, the
roundings of scale*code + bias, and the final additions); a result of 16 bits is rounded once more, by at most half a
unit in the last place: 2**-8 (bfloat16) or 2**-11 (float16) relative, and 2**-25 absolute for float16's subnormals.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import subprocess
import sys

import cpu_calls
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

BF16 = np.dtype(ml_dtypes.bfloat16)
ISAS = cpu_calls.usable_isas()
IDS = {"ids": lambda fmt: fmt[0] if fmt[0] != "affine" else f"int{fmt[1]}g{fmt[2]}"}
formats = pytest.mark.parametrize("fmt", cpu_calls.FORMATS, **IDS)
isas = pytest.mark.parametrize("isa", ISAS)


def rounding(dtype) -> tuple[float, float]:
    """The relative and absolute error of rounding once to `dtype`."""
    return {np.dtype(np.float32): (2**-24, 2**-149), np.dtype(np.float16): (2**-11, 2**-25)}.get(
        np.dtype(dtype), (2**-8, 2**-133)
    )


def multiple(fmt) -> int:
    """What an axis in groups must be a multiple of: whole groups in whole words."""
    return fmt[2] if fmt[2] * fmt[1] % 32 == 0 else 2 * fmt[2]


def magnitude(weight, dense, fmt):
    """|scale*code| + |bias| for every weight: what the rounding errors of scale*code + bias are relative to."""
    if fmt[0] != "affine":
        return np.abs(dense)
    bias = np.repeat(np.asarray(weight[2], np.float64), fmt[2], -1)
    return np.abs(dense - bias) + np.abs(bias)


def check_matmul(rng, fmt, isa, m, n, k, transpose, x_dtype, scale_dtype, lead=()):
    weight, dense = cpu_calls.random_weight(rng, fmt, (*lead, n, k), scale_dtype)
    inner = k if transpose else n
    x = rng.standard_normal((*lead, m, inner)).astype(x_dtype)
    y = np.asarray(cpu_calls.matmul(x, weight, fmt, transpose, isa)).astype(np.float64)
    x64, sizes = x.astype(np.float64), magnitude(weight, dense, fmt)
    want = x64 @ (dense.swapaxes(-1, -2) if transpose else dense)
    terms = np.abs(x64) @ (sizes.swapaxes(-1, -2) if transpose else sizes)
    relative, absolute = rounding(x_dtype)
    error = np.abs(y - want)
    bound = (inner + 8) * 2**-24 * terms + relative * np.abs(want) + absolute
    assert y.shape == want.shape
    assert (error <= bound).all(), f"worst {np.max(error / bound):.3g} of the bound at {np.argmax(error / bound)}"


@isas
@formats
@pytest.mark.parametrize("transpose", [True, False], ids=["t", "n"])
def test_matmul_values(isa, fmt, transpose):
    """Every format, small and odd sizes, tails in every direction; x and scales in three pairs of dtypes, which are
    others for the next format, so that every pair meets every number of bits and every size of group."""
    rng = np.random.default_rng(0)
    step = multiple(fmt)
    shapes = [(1, 33, step), (2, 7, 3 * step), (5, 40, 5 * step), (19, 70, 2 * step)]
    scale_dtypes = cpu_calls.DTYPES if fmt[0] == "affine" else [np.float32]
    pairs = [(a, b) for a in cpu_calls.DTYPES for b in scale_dtypes]
    first = (cpu_calls.FORMATS.index(fmt) + cpu_calls.FORMATS.index(fmt) // 4) % 3
    for index, (x_dtype, scale_dtype) in list(enumerate(pairs))[first :: 3 if len(pairs) > 3 else 1]:
        for m, n, k in shapes if index % 4 == 0 else shapes[index % 2 :: 2]:
            check_matmul(rng, fmt, isa, m, n, k, transpose, x_dtype, scale_dtype)


@isas
@pytest.mark.parametrize("transpose", [True, False], ids=["t", "n"])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 6, 8, 13, 16, 32, 65, 130])
def test_matmul_rows(isa, m, transpose):
    """Every regime of M, on a weight with more rows and columns than one block of any kernel."""
    rng = np.random.default_rng(m)
    for dtype in cpu_calls.DTYPES:
        check_matmul(rng, ("affine", 4, 64), isa, m, 150, 1344, transpose, dtype, dtype)
    check_matmul(rng, ("affine", 3, 32), isa, m, 97, 1056, transpose, np.float32, np.float16)
    check_matmul(rng, ("affine", 2, 16), isa, m, 70, 1312, transpose, np.float16, BF16)
    check_matmul(rng, ("affine", 6, 128), isa, m, 70, 2176, transpose, BF16, np.float16)
    check_matmul(rng, ("affine", 8, 128), isa, m, 70, 2176, transpose, np.float32, np.float32)
    for dtype in cpu_calls.DTYPES:
        check_matmul(rng, ("mxfp8", 8, 32), isa, m, 97, 1056, transpose, dtype, np.float32)


@isas
@formats
@pytest.mark.parametrize("transpose", [True, False], ids=["t", "n"])
def test_matmul_largest_codes(isa, fmt, transpose):
    """All of x of one size, and all codes the largest or the least: no integer sum may overflow on the way."""
    rng, step = np.random.default_rng(4), multiple(fmt)
    n, k = 48, -(-512 // step) * step
    inner = k if transpose else n
    codes = {"affine": [(1 << fmt[1]) - 1], "mxfp8": [0x7E, 0xFE]}.get(fmt[0], [7, 15])
    for index, dtype in enumerate(cpu_calls.DTYPES):
        weight, dense = cpu_calls.random_weight(rng, fmt, (n, k), code=codes[index % len(codes)])
        sizes = magnitude(weight, dense, fmt)
        for m in (1, 6, 33) if dtype == np.float32 else (2,):
            x = np.where(np.arange(m)[:, None] % 2, -1.984375, 1.984375) * np.full((m, inner), 2.0**-8)
            y = np.asarray(cpu_calls.matmul(x.astype(dtype), weight, fmt, transpose, isa)).astype(np.float64)
            want, terms = (x @ (w.T if transpose else w) for w in (dense, sizes))
            relative, absolute = rounding(dtype)
            bound = (inner + 8) * 2**-24 * np.abs(terms) + relative * np.abs(want) + absolute
            assert (np.abs(y - want) <= bound).all()


@isas
def test_matmul_batched(isa):
    rng = np.random.default_rng(1)
    for transpose in (True, False):
        check_matmul(rng, ("affine", 4, 64), isa, 3, 17, 128, transpose, np.float32, np.float32, lead=(2, 3))


@isas
@pytest.mark.parametrize("m", [1, 8, 64])
@pytest.mark.parametrize("fmt", [("affine", 4, 64), ("affine", 8, 128), ("mxfp4", 4, 32)], **IDS)
def test_matmul_keeps_float32_accuracy(isa, fmt, m):
    """The error in norm is within 4 times that of a plain float32 dot product over the dense weight."""
    rng = np.random.default_rng(2)
    weight, dense = cpu_calls.random_weight(rng, fmt, (64, 4096))
    x = rng.standard_normal((m, 4096)).astype(np.float32)
    want = x.astype(np.float64) @ dense.T
    products = x[:, None, :] * dense.astype(np.float32)[None]
    plain = np.add.accumulate(products, axis=-1, dtype=np.float32)[..., -1]
    got = np.asarray(cpu_calls.matmul(x, weight, fmt, isa=isa))
    assert np.linalg.norm(got - want) <= 4 * np.linalg.norm(plain - want)


@isas
@formats
def test_dequantize_values(isa, fmt):
    """float32: two roundings at most, of scale*code and of the sum; 16 bits: one more."""
    rng = np.random.default_rng(3)
    for scale_dtype in cpu_calls.DTYPES if fmt[0] == "affine" else [np.float32]:
        weight, dense = cpu_calls.random_weight(rng, fmt, (7, 5 * multiple(fmt)), scale_dtype)
        for dtype in cpu_calls.DTYPES:
            got = np.asarray(cpu_calls.dequantize(weight, fmt, dtype, isa)).astype(np.float64)
            relative, absolute = rounding(dtype)
            bound = 2 * 2**-24 * magnitude(weight, dense, fmt) + relative * np.abs(dense) + absolute
            assert (np.abs(got - dense) <= bound).all()


def awkward_weights(rng, dtype, step):
    """Rows that meet the corners of the rule: zeros, constants, one sign, ties, tiny and huge values."""
    w = rng.standard_normal((24, 4 * step)) * rng.choice([1e-3, 1.0, 30.0], (24, 1))
    w[1], w[2], w[3] = 0, 1, -0.75
    w[4], w[5] = np.abs(w[4]), -np.abs(w[5])
    w[6] = rng.integers(-8, 8, w[6].shape) / 4
    w[7, ::3] = -0.0
    w[8] *= 1e-6
    w[9, 0] = 6e4
    w[10] = rng.choice(
        [-6, -5, -3.5, -2.5, -1.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], w[10].shape
    )
    return w.astype(dtype)


@isas
@formats
def test_quantize_gives_the_bits_of_mlx(isa, fmt):
    mx = pytest.importorskip("mlx.core")
    mode, bits, group = fmt
    if mode == "affine" and group == 16:
        pytest.skip("MLX has no groups of 16")
    rng = np.random.default_rng(4)
    for dtype in cpu_calls.DTYPES:
        w = awkward_weights(rng, dtype, multiple(fmt))
        source = mx.array(w.view(np.uint16)).view(mx.bfloat16) if dtype == BF16 else mx.array(w)
        want = mx.quantize(source, group_size=group, bits=bits, mode=mode, stream=mx.cpu)
        got = cpu_calls.quantize(w, fmt, isa)
        for name, ours, theirs in zip(("packed", "scales", "biases"), got, want, strict=False):
            theirs = np.array(theirs.view(mx.uint16)) if theirs.dtype == mx.bfloat16 else np.array(theirs)
            ours = np.asarray(ours).view(theirs.dtype)
            np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8), err_msg=f"{name} of {dtype}")


@isas
@formats
def test_quantize_agrees_with_scalar(isa, fmt):
    """Groups of 16, which MLX lacks, included."""
    rng = np.random.default_rng(5)
    for dtype in cpu_calls.DTYPES:
        w = awkward_weights(rng, dtype, multiple(fmt))
        for ours, theirs in zip(cpu_calls.quantize(w, fmt, isa), cpu_calls.quantize(w, fmt, "scalar"), strict=True):
            np.testing.assert_array_equal(np.asarray(ours).view(np.uint8), np.asarray(theirs).view(np.uint8))


@isas
@formats
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantize_poisons_the_group_of_a_nan(isa, fmt, bad):
    rng = np.random.default_rng(6)
    group = fmt[2]
    for dtype in cpu_calls.DTYPES:
        w = rng.standard_normal((3, 4 * multiple(fmt))).astype(dtype)
        w[1, group + 3] = bad
        out = np.asarray(cpu_calls.dequantize(cpu_calls.quantize(w, fmt, isa), fmt, np.float32, isa))
        poisoned = np.zeros(w.shape, bool)
        poisoned[1, group : 2 * group] = True
        np.testing.assert_array_equal(np.isnan(out), poisoned)


@isas
@pytest.mark.parametrize("fmt", [("affine", 4, 64), ("mxfp8", 8, 32)], **IDS)
def test_matmul_passes_nan_and_infinity_on(isa, fmt):
    """A NaN or an infinity in x reaches the rows of y that depend on it, and no other."""
    rng = np.random.default_rng(7)
    weight, _ = cpu_calls.random_weight(rng, fmt, (40, 256))
    for m in (1, 3, 5, 40):
        for dtype in (np.float32, BF16):
            for bad in (np.nan, np.inf):
                x = rng.standard_normal((m, 256)).astype(dtype)
                x[m // 2, 100] = bad
                y = np.asarray(cpu_calls.matmul(x, weight, fmt, isa=isa)).astype(np.float32)
                assert not np.isfinite(y[m // 2]).any()
                assert np.isfinite(np.delete(y, m // 2, 0)).all()


@isas
def test_matmul_passes_the_nan_of_a_weight_on(isa):
    """E4M3 has two codes for NaN, and E8M0 one: each poisons its own row of w."""
    rng = np.random.default_rng(12)
    packed, scales = cpu_calls.random_weight(rng, ("mxfp8", 8, 32), (40, 256))[0]
    codes = packed.view(np.uint8)
    codes[3, 5], codes[7, 255], scales[9, 2] = 0x7F, 0xFF, 0xFF
    for m in (1, 2, 5, 40):
        for dtype in (np.float32, BF16):
            x = rng.standard_normal((m, 256)).astype(dtype)
            y = np.asarray(cpu_calls.matmul(x, (packed, scales), ("mxfp8", 8, 32), isa=isa)).astype(np.float32)
            np.testing.assert_array_equal(np.isnan(y), np.broadcast_to(np.isin(np.arange(40), (3, 7, 9)), y.shape))


@isas
def test_forced_instruction_set_ran(isa):
    """A call served by `isa` is counted there; one that it declines goes down the list, never up."""
    library = cpu_calls.library()
    order = list(cpu_calls.kernels.isas(library))
    rng = np.random.default_rng(8)
    weight, _ = cpu_calls.random_weight(rng, ("affine", 4, 64), (64, 256))
    served = set()
    for dtype in (np.float32, BF16):
        for m in (1, 64):
            before = cpu_calls.kernels.calls(library)
            cpu_calls.matmul(rng.standard_normal((m, 256)).astype(dtype), weight, ("affine", 4, 64), isa=isa)
            after = cpu_calls.kernels.calls(library)
            ran = [name for name in order if after[name] > before[name]]
            assert len(ran) == 1
            assert order.index(ran[0]) >= order.index(isa)
            served.add(ran[0])
    assert isa in served


def test_empty_and_tiny():
    fmt = ("affine", 4, 32)
    rng = np.random.default_rng(9)
    weight, _ = cpu_calls.random_weight(rng, fmt, (5, 64))
    assert cpu_calls.matmul(np.zeros((0, 64), np.float32), weight, fmt).shape == (0, 5)
    nothing = (np.zeros((0, 8), np.uint32), np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32))
    assert cpu_calls.matmul(np.zeros((3, 64), np.float32), nothing, fmt).shape == (3, 0)
    np.testing.assert_array_equal(
        cpu_calls.matmul(np.zeros((3, 0), np.float32), nothing, fmt, False), np.zeros((3, 64))
    )
    assert cpu_calls.dequantize(nothing, fmt, np.float32).shape == (0, 64)
    no_codes = (np.zeros((5, 0), np.uint32), np.zeros((5, 0), np.float32), np.zeros((5, 0), np.float32))
    np.testing.assert_array_equal(cpu_calls.matmul(np.zeros((2, 0), np.float32), no_codes, fmt), np.zeros((2, 5)))


def _refused(match, op, results, *operands, **attributes):
    keywords = {"mode": "affine", "bits": 4, "group": 64} | attributes
    with pytest.raises(Exception, match=match):
        jax.block_until_ready(cpu_calls.call(op, results, *operands, **keywords))


def test_handlers_refuse_wrong_buffers():
    """Buffers that do not fit each other or the attributes come back as errors, before anything is read."""
    x, packed, scales = np.zeros((2, 128), np.float32), np.zeros((5, 16), np.uint32), np.zeros((5, 2), np.float32)
    y = jax.ShapeDtypeStruct((2, 5), np.float32)
    good = (x, packed, scales, scales)

    def refused(match, operands=good, result=y, **attributes):
        _refused(match, "quantized_matmul", result, *operands, transpose=True, **attributes)

    refused("must end in 128", (x[:, :64], *good[1:]))
    refused("does not hold that many", (x, packed[:, :8], scales, scales))
    refused("differ before the last axis", (x, packed[:3], scales, scales))
    refused("like scales", (x, packed, scales, scales[:, :1]))
    refused("like scales", (x, packed, scales, scales.astype(np.float16)))
    refused("biases are missing", (x, packed, scales))
    refused("too many operands", (*good, scales))
    stack, zero = tuple(a[None] for a in good[1:]), np.int32(0)
    refused("too many operands", (x, *stack, zero, zero))
    refused("too many operands", (x, *stack[:2], zero, stack[2]))
    refused("biases are missing", (x, *stack[:2], zero))
    refused("the index must be int32", (x, *stack, np.uint32(0)))
    refused(r"an index needs a stack of weights, not a leaf of shape \[5, 16\]", (*good, zero))
    refused("of different lengths", (x, *stack[:2], np.concatenate([stack[2]] * 2), zero))
    refused("a stack that is not empty", (x, *(a[:0] for a in stack), zero))
    refused("must end in 128", (x[:, :64], *stack, zero))
    refused("packed must be uint32", (x, packed.astype(np.int32), scales, scales))
    refused("scales must be float32", (x, packed, scales.astype(np.int32), scales))
    refused("x must be float32", (x.astype(np.int32), *good[1:]))
    refused("does not follow", result=jax.ShapeDtypeStruct((2, 4), np.float32))
    refused("dtype must be x's", result=jax.ShapeDtypeStruct((2, 5), jnp.bfloat16))
    refused("at least 2 axes", (x[0], *good[1:]), jax.ShapeDtypeStruct((5,), np.float32))
    refused(
        "differ in their leading axes",
        (x[None], *(np.stack([a, a]) for a in good[1:])),
        jax.ShapeDtypeStruct((1, 2, 5), np.float32),
    )
    refused("no format", bits=7)
    refused("no format", group=24)
    refused("unknown", mode="octal")
    refused("not in this build", isa="mmx")
    refused("uint8", mode="nvfp4", group=16, operands=(x, packed, np.zeros((5, 8), np.float32)))
    refused("no biases", mode="mxfp4", group=32, operands=(x, packed, *[np.zeros((5, 4), np.uint8)] * 2))
    _refused("does not follow", "dequantize", jax.ShapeDtypeStruct((5, 64), np.float32), packed, scales, scales)
    words, like = jax.ShapeDtypeStruct((5, 16), np.uint32), jax.ShapeDtypeStruct((5, 2), np.float32)
    _refused("does not follow", "quantize", (words, like, like), np.zeros((5, 64), np.float32))
    _refused("w's dtype", "quantize", (words, like, like), np.zeros((5, 128), np.float16))


@pytest.mark.parametrize("index", [-(2**31), -1, 0, 1, 2, 3, 2**31 - 1])
def test_an_index_out_of_range_is_clamped(index):
    rng = np.random.default_rng(0)
    for fmt in (("affine", 4, 64), ("mxfp4", 4, 32)):
        leaves, _ = cpu_calls.random_weight(rng, fmt, (3, 5, 128))
        x, result = rng.standard_normal((2, 128)).astype(np.float32), jax.ShapeDtypeStruct((2, 5), np.float32)
        keywords = dict(zip(("mode", "bits", "group"), fmt, strict=True), transpose=True)
        got = cpu_calls.call("quantized_matmul", result, x, *leaves, np.int32(index), **keywords)
        one = [leaf[min(max(index, 0), 2)] for leaf in leaves]
        np.testing.assert_array_equal(got, cpu_calls.matmul(x, one, fmt))


def _thread_cases():
    rng = np.random.default_rng(10)
    cases = []
    for m, n, k in ((1, 300, 512), (4, 65, 1024), (9, 128, 256), (33, 200, 384)):
        for dtype in (np.float32, BF16):
            for transpose in (True, False):
                weight, _ = cpu_calls.random_weight(rng, ("affine", 4, 64), (n, k))
                x = rng.standard_normal((m, k if transpose else n)).astype(dtype)
                cases.append((x, weight, transpose))
    return cases


def test_reentrant_and_deterministic():
    """Eight Python threads, different shapes at once, each with the very bits of a call made alone."""
    cases = _thread_cases()
    fmt = ("affine", 4, 64)
    run = jax.jit(lambda x, weight, transpose: cpu_calls.matmul(x, weight, fmt, transpose), static_argnums=2)
    want = [np.asarray(run(*case)).tobytes() for case in cases]

    def worker(seed):
        order = np.random.default_rng(seed).integers(0, len(cases), 200)
        return all(np.asarray(run(*cases[i])).tobytes() == want[i] for i in order)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(worker, range(8)))


_PRINT_BITS = """
import hashlib, os, sys
if sys.argv[1] == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import cpu_calls
import numpy as np
rng = np.random.default_rng(11)
digest = hashlib.sha256()
for m in (1, 5, 40):
    for transpose in (True, False):
        weight, _ = cpu_calls.random_weight(rng, ("affine", 4, 64), (300, 640))
        for dtype in (np.dtype(np.float32), cpu_calls.DTYPES[2]):
            x = rng.standard_normal((m, 640 if transpose else 300)).astype(dtype)
            digest.update(np.asarray(cpu_calls.matmul(x, weight, ("affine", 4, 64), transpose)).tobytes())
print(digest.hexdigest())
"""


def outputs_on_one_cpu_and_on_all(code: str) -> set[str]:
    """What a program prints that gets "one", and binds itself to a CPU then, or "all".

    XLA's pool has a thread for every CPU that the process may use.
    """
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system cannot bind a process to a CPU")
    paths = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    return {
        subprocess.run(
            [sys.executable, "-c", code, cpus], env=environment, check=True, capture_output=True, text=True
        ).stdout
        for cpus in ("one", "all")
    }


def test_same_bits_on_one_cpu_and_on_all():
    assert len(outputs_on_one_cpu_and_on_all(_PRINT_BITS)) == 1


def test_a_library_that_cannot_be_opened_says_why(tmp_path):
    path = tmp_path / "libjaxq_cpu.so"
    path.write_bytes(b"not a library")
    with pytest.raises(
        cpu_calls.kernels.KernelsUnavailable, match=r"cannot be used .*python -m jaxq.kernels.cpu.build"
    ):
        cpu_calls.kernels.load_cpu_library(path)
