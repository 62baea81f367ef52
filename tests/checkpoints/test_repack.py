"""The compiled repacking makes the bits of the NumPy code, which test_gguf.py and test_gptq_awq.py hold to oracles."""

import os

import jax
import ml_dtypes
import numpy as np
import pytest
import test_gguf
import test_gptq_awq
from checkpoint_cases import same_bits

from jaxq import checkpoints, kernels
from jaxq.checkpoints import awq, gptq
from jaxq.checkpoints.files import empty
from jaxq.checkpoints.gguf_blocks import BLOCKS
from jaxq.kernels import repack

# On x86: AVX-512, AVX2 and plain code; a CPU with fewer of them runs plain code more than once.
SKIPS = (0, 1, 2)


@pytest.fixture(autouse=True)
def library():
    """Skipped where the library was not built; one that is there but can't be used is a failure."""
    try:
        kernels.cpu_library()
    except kernels.KernelsUnavailable as error:
        pytest.skip(str(error))
    assert repack.available()


def new_leaves(block, n, dtype):
    """Flat leaves for n blocks, each with a guard behind it that must stay as it is."""
    sizes = [n * block.spec.words(block.block)] + [n * block.spec.groups(block.block)] * (1 + block.spec.is_affine)
    dtypes = [np.uint32] + [dtype] * (len(sizes) - 1)
    whole = [np.full(size + 16, 77, dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    return whole, [leaf[:-16] for leaf in whole]


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, skip):
    block = BLOCKS[name]
    dtypes = [np.float32, np.float16, ml_dtypes.bfloat16] if block.spec.is_affine else [np.uint8]
    # Around the strips of 2048 weights: less than one, whole ones, and a rest.
    for n in (1, 3, 2048 // block.block, 3 * 2048 // block.block + 1):
        data = test_gguf.blocks(name, (n, block.block), seed=n)
        for dtype in dtypes:
            whole, leaves = new_leaves(block, n, dtype)
            _, expected = new_leaves(block, n, dtype)
            assert repack.blocks(name, data, leaves, weights=block.block, spec=block.spec, skip=skip)
            assert block.repack(data, expected)
            assert all(map(same_bits, leaves, expected)), (n, dtype)
            assert all(np.all(leaf[-16:] == 77) for leaf in whole)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("name", [name for name in BLOCKS if BLOCKS[name].spec.is_affine])
def test_every_fp16(name, skip):
    """Zeros of both signs, subnormals, infinities and NaNs in the scales. NaNs keep no payload."""
    block = BLOCKS[name]
    fields = test_gguf.TYPES[name][0]
    every = np.arange(1 << 16, dtype=np.uint16)
    data = np.tile(test_gguf.blocks(name, (1024, block.block)), (64, 1))
    for i, at in enumerate(fields):
        data[:, at : at + 2] = np.roll(every, 77 * i)[:, None].view(np.uint8)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        _, leaves = new_leaves(block, len(data), dtype)
        _, expected = new_leaves(block, len(data), dtype)
        fits = repack.blocks(name, data, leaves, weights=block.block, spec=block.spec, skip=skip)
        assert fits == block.repack(data, expected)
        assert same_bits(leaves[0], expected[0])
        for ours, theirs in zip(leaves[1:], expected[1:], strict=True):
            nan = np.isnan(theirs)
            assert np.array_equal(np.isnan(ours), nan) and same_bits(ours[~nan], theirs[~nan])


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("inputs, columns", [(8, 1), (96, 5), (128, 16), (264, 33)])
def test_words(inputs, columns, skip):
    words = np.random.default_rng(inputs).integers(-(2**31), 2**31, (inputs, columns)).astype(np.int32)
    whole = np.full((8 * columns, inputs // 8 + 7), 77, np.uint32)
    repack.awq(words, whole[:, 3:-4], skip=skip)
    assert same_bits(whole[:, 3:-4], awq._repack(words))
    assert np.all(whole[:, :3] == 77) and np.all(whole[:, -4:] == 77)
    whole = np.full((columns, inputs + 7), 77, np.uint32)
    repack.transpose(words, whole[:, 3:-4], skip=skip)
    assert same_bits(whole[:, 3:-4], words.view(np.uint32).T)
    assert np.all(whole[:, :3] == 77) and np.all(whole[:, -4:] == 77)


@pytest.mark.parametrize("skip", SKIPS)
def test_words_in_lines(skip):
    """Rows that begin on cache lines, which are written another way; whole tiles of 16 words and rests beside them."""
    for inputs, columns in ((128, 16), (256, 32), (384, 40), (136, 16)):
        words = np.random.default_rng(inputs).integers(-(2**31), 2**31, (inputs, columns)).astype(np.int32)
        for make, shape in ((repack.awq, (8 * columns, inputs // 8)), (repack.transpose, (columns, inputs))):
            whole = empty((shape[0], -(-shape[1] // 16) * 16 + 32), np.uint32)
            whole[...] = 77
            make(words, whole[:, 16 : 16 + shape[1]], skip=skip)
            expected = awq._repack(words) if make is repack.awq else words.view(np.uint32).T
            assert same_bits(whole[:, 16 : 16 + shape[1]], expected)
            assert np.all(whole[:, :16] == 77) and np.all(whole[:, 16 + shape[1] :] == 77)


FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize(
    "bits, order, less", [(2, "gptq", 1), (3, "gptq", 1), (4, "gptq", 0), (8, "gptq", 1), (4, "awq", 0)]
)
def test_groups(bits, order, less, skip):
    """Every dtype to every dtype, groups that repeat and that are cut, around tiles of 16 groups and 32 outputs."""
    rng = np.random.default_rng(bits)
    for groups, outputs, repeats, row in (
        (1, 32, 1, 1),
        (17, 96, 1, 17),
        (16, 64, 3, 46),
        (5, 32 if bits == 3 else 48, 2, 10),
    ):
        zeros = rng.integers(0, 2**32, (groups, outputs * bits // 32), np.uint32).view(np.int32)
        points = awq._unpack(zeros) if order == "awq" else gptq._zeros(zeros, bits, 2 - less)
        for dtype in FLOATS:
            scales = rng.standard_normal((groups, outputs)).astype(dtype)
            biases = np.float32(0) - scales.astype(np.float32) * points
            for target in FLOATS:
                whole = np.full((2, outputs * row + 16), 77, target)
                out = [part[:-16].reshape(outputs, row) for part in whole]
                call = {"bits": bits, "order": order, "less": less, "repeats": repeats, "skip": skip}
                kept = repack.groups(scales, zeros, out, **call)
                expected = [values.astype(target) for values in (scales, biases)]
                for made, values in zip(out, expected, strict=True):
                    assert same_bits(made, np.repeat(values, repeats, axis=0)[:row].T), (dtype, target)
                assert np.all(whole[:, -16:] == 77)
                exact = all(
                    map(np.array_equal, (e.astype(np.float32) for e in expected), (scales.astype(np.float32), biases))
                )
                assert kept == ("exact" if exact else "rounded"), (dtype, target)


@pytest.mark.parametrize("skip", SKIPS)
def test_groups_that_are_not_numbers(skip):
    """What is infinite or NaN stays so and is no loss; what becomes infinite is."""
    zeros = np.full((1, 4), 0x11111111, np.uint32).view(np.int32)
    for value, kept in (
        (np.inf, "exact"),
        (-np.inf, "exact"),
        (np.nan, "exact"),
        (65519, "rounded"),
        (65520, "beyond"),
    ):
        scales, out = np.full((1, 32), value, np.float32), list(np.empty((2, 32, 1), np.float16))
        assert repack.groups(scales, zeros, out, bits=4, order="gptq", less=0, repeats=1, skip=skip) == kept
        with np.errstate(over="ignore"):
            assert np.array_equal(out[0], scales.astype(np.float16).T, equal_nan=True)
            assert np.array_equal(out[1], (-scales).astype(np.float16).T, equal_nan=True)
    scales, out = np.full((1, 32), 3.39e38, np.float32), list(np.empty((2, 32, 1), ml_dtypes.bfloat16))
    call = {"bits": 4, "order": "gptq", "less": 0, "repeats": 1, "skip": skip}
    assert repack.groups(scales, zeros, out, **call) == "rounded"
    assert repack.groups(np.full((1, 32), 3.4e38, np.float32), zeros, out, **call) == "beyond"


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("batch", [1, 5, 17, 100])
def test_blocks_of_a_file(tmp_path, batch, skip):
    """As many as there are places for, from some byte on, whatever the batch; and those before a file's end."""
    block, data = BLOCKS["Q4_K"], test_gguf.blocks("Q4_K", (17, 256))
    (tmp_path / "x").write_bytes(b"abc" + data.tobytes() + b"more")
    call = {"nbytes": block.nbytes, "weights": 256, "spec": block.spec, "batch": batch, "skip": skip}
    whole, leaves = new_leaves(block, 17, np.float32)
    _, expected = new_leaves(block, 17, np.float32)
    assert block.repack(data, expected)
    with open(tmp_path / "x", "rb") as file:
        assert repack.file_blocks("Q4_K", file.fileno(), 3, leaves, **call) == (17, True)
        assert all(map(same_bits, leaves, expected))
        assert all(np.all(leaf[-16:] == 77) for leaf in whole)
        os.truncate(tmp_path / "x", 3 + 12 * block.nbytes - 1)
        assert repack.file_blocks("Q4_K", file.fileno(), 3, leaves, **call) == (11 // batch * batch, True)
        assert repack.file_blocks("Q4_K", file.fileno(), 1 << 40, leaves, **call) == (0, True)
        with pytest.raises(ValueError, match="is not known"):
            repack.file_blocks("Q4_K", file.fileno(), 3, leaves, **(call | {"nbytes": 143}))
        with pytest.raises(ValueError, match="batch=0"):
            repack.file_blocks("Q4_K", file.fileno(), 3, leaves, **(call | {"batch": 0}))
        with pytest.raises(ValueError, match="is due"):
            repack.file_blocks("Q4_K", file.fileno(), 3, [leaves[0][:-1], *leaves[1:]], **call)
    with pytest.raises(OSError, match="Bad file"):
        repack.file_blocks("Q4_K", -1, 3, leaves, **call)


def test_blocks_of_a_file_beyond_float16(tmp_path):
    """That one batch does not fit is told, whatever comes after it."""
    data = np.zeros((3, 34), np.uint8)
    data[1, :2] = np.array([1000], np.float16).view(np.uint8)  # its bias is -128 times that
    (tmp_path / "x").write_bytes(data.tobytes())
    call = {"nbytes": 34, "weights": 32, "spec": BLOCKS["Q8_0"].spec, "batch": 1}
    with open(tmp_path / "x", "rb") as file:
        for dtype, fits in ((np.float16, False), (np.float32, True)):
            _, leaves = new_leaves(BLOCKS["Q8_0"], 3, dtype)
            assert repack.file_blocks("Q8_0", file.fileno(), 0, leaves, **call) == (3, fits)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("batch", [8, 16, 128, 1000])
@pytest.mark.parametrize("order", ["gptq", "awq"])
def test_words_of_a_file(tmp_path, order, batch, skip):
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (264, 33)).astype(np.int32)
    (tmp_path / "x").write_bytes(b"abc" + words.tobytes() + b"more")
    expected = awq._repack(words) if order == "awq" else words.view(np.uint32).T
    whole = np.full((len(expected), expected.shape[1] + 7), 77, np.uint32)
    call = {"batch": batch, "skip": skip}
    with open(tmp_path / "x", "rb") as file:
        assert repack.file_words(order, file.fileno(), 3, words.shape, whole[:, 3:-4], **call) == 264
        assert same_bits(whole[:, 3:-4], expected)
        assert np.all(whole[:, :3] == 77) and np.all(whole[:, -4:] == 77)
        os.truncate(tmp_path / "x", 3 + words.nbytes - 1)
        done = 263 // min(batch, 264) * batch
        assert repack.file_words(order, file.fileno(), 3, words.shape, whole[:, 3:-4], **call) == done
        for changed in ({"batch": 12}, {"shape": (264, 32)}, {"shape": (260, 33)}):
            fields = {"shape": words.shape} | call | changed
            with pytest.raises(ValueError):
                repack.file_words(order, file.fileno(), 3, fields.pop("shape"), whole[:, 3:-4], **fields)
    with pytest.raises(OSError, match="Bad file"):
        repack.file_words(order, -1, 3, words.shape, whole[:, 3:-4], **call)


def test_files_cut_after_opening_are_refused(tmp_path):
    """By the tensor's name, and with nothing of them loaded."""
    tensors = {"w": ("Q4_K", test_gguf.blocks("Q4_K", (3, 512)))}
    paths = {
        test_gguf.write(tmp_path / "x.gguf", tensors): "w",
        test_gptq_awq.save_gptq(tmp_path / "gptq", *test_gptq_awq.made(256, 64, 3, 32), 3, 32): "qweight",
        test_gptq_awq.save_awq(tmp_path / "awq", *test_gptq_awq.made(256, 64, 4, 32)[:3], 32): "qweight",
    }
    for path, name in paths.items():
        checkpoint = checkpoints.open(path)
        file = path if path.is_file() else next(path.glob("*.safetensors"))
        os.truncate(file, 1000)
        with pytest.raises(checkpoints.CheckpointError, match=rf"{name}': ends at byte \d+; it was longer"):
            checkpoint.load()


def test_groups_that_do_not_fit_are_refused():
    scales, zeros = np.zeros((3, 32), np.float16), np.zeros((3, 4), np.int32)
    call = {"bits": 4, "order": "awq", "less": 0, "repeats": 2}
    good = np.zeros((2, 32, 6), np.float32)
    repack.groups(scales, zeros, list(good), **call)
    for bad_scales, bad_zeros, out, changed in (
        (scales[:2], zeros, good, {}),
        (scales, zeros[:, :3].copy(), good, {}),
        (scales, zeros[:, ::2], good, {}),
        (scales, zeros.astype(np.int64), good, {}),
        (scales.astype(np.float64), zeros, good, {}),
        (scales, zeros, good.astype(np.int32), {}),
        (scales, zeros, good[:, :31], {}),
        (scales, zeros, np.zeros((2, 32, 7), np.float32), {}),
        (scales, zeros, np.zeros((2, 32, 4), np.float32), {}),
        (scales, zeros, good[:1], {}),
        (scales, np.zeros((3, 8), np.int32), good, {"bits": 8}),
        (scales, np.zeros((3, 5), np.int32), good, {"bits": 5, "order": "gptq"}),
    ):
        with pytest.raises(ValueError):
            repack.groups(bad_scales, bad_zeros, list(out), **(call | changed))


def test_what_does_not_fit_is_refused():
    block = BLOCKS["Q4_K"]
    data = test_gguf.blocks("Q4_K", (4, 256))
    _, good = new_leaves(block, 4, np.float32)
    call = {"weights": 256, "spec": block.spec}
    repack.blocks("Q4_K", data, good, **call)
    _, short = new_leaves(block, 3, np.float32)
    mixed = [*good[:2], good[2].astype(np.float16)]
    for leaves in (short, mixed, good[:2], [good[0].view(np.int32), *good[1:]], [good[0][::-1], *good[1:]]):
        with pytest.raises(ValueError):
            repack.blocks("Q4_K", data, leaves, **call)
    for name, blocks in (("Q4_K", data[:, ::2]), ("Q4_K", data[:, :-1].copy()), ("Q5_K", data), ("Q9", data)):
        with pytest.raises(ValueError):
            repack.blocks(name, blocks, good, **call)
    words, out = np.zeros((16, 3), np.int32), np.zeros((24, 2), np.uint32)
    for call, bad_words, bad_out in (
        (repack.awq, words[:12], out),
        (repack.awq, words, out[:-1]),
        (repack.awq, words, out.T.copy().T),
        (repack.awq, words.astype(np.int64), out),
        (repack.transpose, words, out),
        (repack.transpose, words.astype(np.int64), np.zeros((3, 16), np.uint32)),
    ):
        with pytest.raises(ValueError):
            call(bad_words, bad_out)


def test_checkpoints_load_the_same_without_the_library(tmp_path, monkeypatch):
    tensors = {name: (name, test_gguf.blocks(name, (3, 512))) for name in BLOCKS}
    paths = [
        test_gguf.write(tmp_path / "x.gguf", tensors),
        test_gptq_awq.save_gptq(tmp_path / "gptq", *test_gptq_awq.made(256, 64, 3, 32), 3, 32),
        test_gptq_awq.save_awq(tmp_path / "awq", *test_gptq_awq.made(256, 64, 4, 32)[:3], 32),
    ]
    compiled = [checkpoints.load(path) for path in paths]
    monkeypatch.setattr(repack, "available", lambda: False)
    assert jax.tree.all(jax.tree.map(same_bits, [checkpoints.load(path) for path in paths], compiled))
