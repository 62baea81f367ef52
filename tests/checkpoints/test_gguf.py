"""GGUF: every type against the gguf package's own dequantization, and files that lie."""

import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_cases import dense, same_bits, write_bytes

import jaxq
from jaxq import checkpoints
from jaxq.checkpoints import CheckpointError, gguf
from jaxq.checkpoints.codes import pack, unpack

package = pytest.importorskip("gguf")

# type -> the bytes of its fp16 fields in a block, its format, and whether float16 holds its scales
TYPES = {
    "Q4_0": ((0,), "int4g32", True),
    "Q4_1": ((0, 2), "int4g32", True),
    "Q5_0": ((0,), "int5g32", True),
    "Q5_1": ((0, 2), "int5g32", True),
    "Q8_0": ((0,), "int8g32", True),
    "Q2_K": ((80, 82), "int2g16", False),
    "Q3_K": ((108,), "int3g16", False),
    "Q4_K": ((0, 2), "int4g32", False),
    "Q5_K": ((0, 2), "int5g32", False),
    "Q6_K": ((208,), "int6g16", False),
    "TQ1_0": ((52,), "int2g128", True),
    "TQ2_0": ((64,), "int2g128", True),
    "MXFP4": ((), "mxfp4", True),
}


def blocks(name, shape, seed=0):
    """uint8[..., bytes of a row] of random bits, with finite numbers in the fp16 fields and ordinary exponents."""
    rng = np.random.default_rng(seed)
    size, nbytes = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[name]]
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // size, nbytes), np.uint8)
    fields = TYPES[name][0] if name in TYPES else ()
    for at in fields:
        d = rng.normal(0, 0.05, data.shape[:-1]).astype(np.float16)
        data[..., at : at + 2] = d[..., None].view(np.uint8)
    if name == "MXFP4":
        data[..., 0] = rng.integers(1, 250, data.shape[:-1])
    return data.reshape(*shape[:-1], -1)


def write(path, tensors, metadata=(), architecture="llama"):
    """tensors: {name: array, or (type, bytes)}."""
    writer = package.GGUFWriter(path, architecture)
    writer.add_uint32("some.number", 7)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "é"])
    writer.add_array("some.floats", [0.5, 1.5])
    for add, *arguments in metadata:
        getattr(writer, add)(*arguments)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[1], raw_dtype=package.GGMLQuantizationType[tensor[0]])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", TYPES)
def test_every_type_exactly(tmp_path, name):
    shape = (3, 5, 512)
    data = blocks(name, shape)
    path = write(tmp_path / "x.gguf", {"w": (name, data), "norm": np.ones(4, np.float32)})
    qw = checkpoints.load(path)["w"]
    assert str(qw.spec) == TYPES[name][1] and qw.shape == shape
    expected = package.dequantize(data, package.GGMLQuantizationType[name])
    # Equal, not the same bits: ggml has one zero in MXFP4, and E2M1 has two.
    np.testing.assert_array_equal(dense(qw), expected)
    if name in ("Q4_K", "MXFP4"):  # and the whole way
        np.testing.assert_array_equal(jaxq.dequantize(qw, jnp.float32), expected)
    if qw.spec.is_affine:
        assert qw.scales.dtype == (np.float16 if TYPES[name][2] else np.float32)
        exact = checkpoints.load(path, scale_dtype=np.float32)["w"]
        np.testing.assert_array_equal(dense(exact), expected)


@pytest.mark.parametrize("dtype, unit", [(np.float16, 2.0**-11), (ml_dtypes.bfloat16, 2.0**-8)])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0"])
def test_narrower_scales_lose_what_is_said(tmp_path, name, dtype, unit):
    data = blocks(name, (4, 512))
    qw = checkpoints.load(write(tmp_path / "x.gguf", {"w": (name, data)}), scale_dtype=dtype)["w"]
    exact = checkpoints.load(tmp_path / "x.gguf", scale_dtype=np.float32)["w"]
    assert qw.scales.dtype == dtype and same_bits(qw.packed, exact.packed)
    spread = lambda leaf: np.repeat(np.abs(np.asarray(leaf, np.float64)), qw.group_size, axis=-1)  # noqa: E731
    # Each of scale and bias is rounded by half a unit in the last place, at most `unit` of itself, or, in float16's
    # subnormals, 2**-25; the code is at most max_code. float32's own roundings are 2**-24 of the same terms.
    terms = qw.spec.max_code * spread(exact.scales) + spread(exact.biases)
    bound = terms * (unit + 2.0**-22) + 2.0**-25 * (qw.spec.max_code + 1)
    error = np.abs(dense(qw).astype(np.float64) - dense(exact))
    assert np.all(error <= bound)
    # Only Q8_0's scales are float16s to begin with.
    assert (error.max() == 0) == (name == "Q8_0" and dtype == np.float16)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.int32, np.int64])
def test_dense_tensors(tmp_path, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    stored = ("BF16", array.view(np.uint8)) if dtype == ml_dtypes.bfloat16 else array
    loaded = checkpoints.load(write(tmp_path / "x.gguf", {"w": stored}))["w"]
    assert same_bits(loaded, array)


def test_metadata(tmp_path):
    path = write(tmp_path / "x.gguf", {"w": np.ones(3, np.float32)}, [("add_string", "some.text", "ü")])
    checkpoint = checkpoints.open(path)
    assert checkpoint.format == "gguf" and checkpoint.config["general.architecture"] == "llama"
    assert checkpoint.config["some.number"] == 7 and checkpoint.config["some.text"] == "ü"
    assert checkpoint.config["tokenizer.ggml.tokens"] == ["a", "b", "é"]
    np.testing.assert_array_equal(checkpoint.config["some.floats"], [0.5, 1.5])


@pytest.mark.parametrize("chunk", ["_CHUNK", "_NUMPY_CHUNK"])
def test_a_file_of_many_blocks_goes_in_pieces(tmp_path, monkeypatch, chunk):
    data = blocks("Q5_K", (7, 1024))
    path = write(tmp_path / "x.gguf", {"w": ("Q5_K", data)})
    whole = checkpoints.load(path)["w"]
    monkeypatch.setattr(gguf, chunk, 3 * 176)  # three of the 28 blocks
    if chunk == "_NUMPY_CHUNK":
        monkeypatch.setattr(gguf.repack, "available", lambda: False)
    assert jax.tree.all(jax.tree.map(same_bits, checkpoints.load(path)["w"], whole))


@pytest.mark.parametrize("name", ["IQ4_NL", "IQ2_XXS", "NVFP4"])
def test_what_is_no_group_format_is_refused_or_dequantized(tmp_path, name):
    data = blocks(name, (2, 256))
    path = write(tmp_path / "x.gguf", {"good": np.ones(3, np.float32), "bad": (name, data)})
    with pytest.raises(CheckpointError, match=f"tensor 'bad': is {name}, .* dequantize=True"):
        checkpoints.load(path)
    with pytest.raises(CheckpointError, match="tensor 'bad'"):
        gguf.open(path)["bad"]
    assert set(checkpoints.load(path, select="good")) == {"good"}
    loaded = checkpoints.load(path, dequantize=True)["bad"]
    assert same_bits(loaded, package.dequantize(data, package.GGMLQuantizationType[name]).astype(np.float32))


def test_a_vector_of_blocks_is_refused_or_dequantized(tmp_path):
    data = blocks("Q8_0", (64,))
    path = write(tmp_path / "x.gguf", {"w": ("Q8_0", data)})
    with pytest.raises(CheckpointError, match="tensor 'w': is a vector of blocks"):
        checkpoints.load(path)
    expected = package.dequantize(data, package.GGMLQuantizationType.Q8_0)
    assert same_bits(checkpoints.load(path, dequantize=True)["w"], expected)


def test_biases_beyond_float16_are_refused(tmp_path):
    data = blocks("Q8_0", (2, 32))
    data[0, :2] = np.array([600], np.float16).view(np.uint8)  # -128 * 600 is below float16's -65504
    path = write(tmp_path / "x.gguf", {"w": ("Q8_0", data)})
    with pytest.raises(CheckpointError, match=r"tensor 'w': .* pass scale_dtype=float32"):
        checkpoints.load(path)
    exact = checkpoints.load(path, scale_dtype=np.float32)["w"]
    np.testing.assert_array_equal(dense(exact), package.dequantize(data, package.GGMLQuantizationType.Q8_0))


def test_a_scale_dtype_that_is_none(tmp_path):
    path = write(tmp_path / "x.gguf", {"w": np.ones(3, np.float32)})
    with pytest.raises(TypeError, match="scale_dtype=int8"):
        gguf.open(path, scale_dtype=np.int8)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 96), np.uint8)
    stream = (codes[..., None] >> np.arange(bits, dtype=np.uint8) & 1).reshape(3, -1)
    expected = np.packbits(stream, axis=-1, bitorder="little").view(np.uint32)
    assert same_bits(pack(codes.copy(), bits), expected)
    if 8 % bits == 0 and bits > 1:
        assert same_bits(unpack(expected, bits), codes)


# ---- files that lie


def text(string):
    data = string.encode() if isinstance(string, str) else string
    return struct.pack("<Q", len(data)) + data


def info(name="w", shape=(4,), kind=0, offset=0, rank=None):
    rank = len(shape) if rank is None else rank
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", rank, *shape, kind, offset)


def raw(infos=(), metadata=(), data=b"", *, magic=b"GGUF", version=3, tensors=None, count=None):
    """A GGUF file by hand."""
    counts = (len(infos) if tensors is None else tensors, len(metadata) if count is None else count)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(metadata) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


def array(kind, n, body=b""):
    return text("a") + struct.pack("<IIQ", 9, kind, n) + body


NESTED = text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100
BIG = 2**63

# what is wrong -> (file, what the error says)
BAD_FILES = {
    "empty": (b"", "does not begin"),
    "magic": (raw(magic=b"GGML"), "does not begin"),
    "version 1": (raw(version=1), "version 1;"),
    "big-endian": (raw(version=3 << 24), "version 50331648"),
    "tensors": (raw(tensors=BIG), "9223372036854775808 tensors"),
    "metadata": (raw(count=BIG), "9223372036854775808 metadata"),
    "long key": (raw(metadata=[struct.pack("<Q", BIG)], data=bytes(64)), "characters of a key"),
    "key": (raw(metadata=[text(b"\xff") + struct.pack("<II", 4, 0)]), "no UTF-8"),
    "key twice": (raw(metadata=[text("a") + struct.pack("<II", 4, 0)] * 2), "'a' stand there twice"),
    "kind": (raw(metadata=[text("a") + struct.pack("<II", 99, 0)]), "type 99"),
    "long array": (raw(metadata=[array(4, BIG)]), "elements of 'a'"),
    "long list": (raw(metadata=[array(8, BIG)]), "elements of 'a'"),
    "nested": (raw(metadata=[NESTED]), "nested deeper"),
    "alignment": (raw(metadata=[text("general.alignment") + struct.pack("<II", 4, 33)]), "alignment is 33"),
    "no alignment": (raw(metadata=[text("general.alignment") + struct.pack("<II", 4, 0)]), "alignment is 0"),
    "name": (raw([info(b"\xff")], data=bytes(16)), "no UTF-8"),
    "name twice": (raw([info(), info(offset=32)], data=bytes(64)), "'w': stands there twice"),
    "rank": (raw([info(rank=5)], data=bytes(64)), "'w': 5 dimensions"),
    "type": (raw([info(kind=99)], data=bytes(64)), "'w': type number 99"),
    "removed type": (raw([info(kind=4)], data=bytes(64)), "'w': type number 4"),
    "rows": (raw([info(shape=(33, 2), kind=8)], data=bytes(999)), "'w': rows of 33 .* 32"),
    "offset": (raw([info(offset=1)], data=bytes(64)), "'w': offset 1 is no multiple"),
    "outside": (raw([info(offset=BIG)], data=bytes(64)), "'w': .* truncated"),
    "cut": (raw([info()], data=bytes(15)), "'w': .* truncated"),
    "absurd shape": (raw([info(shape=(2**40, 2**40, 2**40, 2**40))], data=bytes(64)), "'w': .* truncated"),
    "overlap": (raw([info(shape=(16,)), info("v", offset=32)], data=bytes(64)), "'v': .* overlap .* 'w'"),
    "cut header": (raw([info()])[:60], "bytes"),
}


@pytest.mark.parametrize("data, message", BAD_FILES.values(), ids=list(BAD_FILES))
def test_a_file_that_lies_is_refused(tmp_path, data, message):
    with pytest.raises(CheckpointError, match=message):
        gguf.open(write_bytes(tmp_path / "x.gguf", data))


def test_the_hand_made_file_is_well_formed(tmp_path):
    values = np.arange(4, dtype=np.float32)
    path = write_bytes(tmp_path / "x.gguf", raw([info()], [array(4, 1, bytes(4))], values.tobytes()))
    assert same_bits(checkpoints.load(path)["w"], values)
