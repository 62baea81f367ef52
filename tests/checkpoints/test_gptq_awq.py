"""GPTQ and AWQ: against their packages' formulas and packing, written down independently, and files that lie."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_cases import codes_of, dense, same_bits

from jaxq import checkpoints
from jaxq.checkpoints import CheckpointError, gptq, safetensors, zero_points

RNG = np.random.default_rng(0)


def pack_rows(codes, bits):
    """int32[K * bits / 32, N] from codes [K, N], bit by bit: code i of a column fills bits i * bits and on."""
    words = np.zeros((len(codes) * bits // 32, codes.shape[1]), np.uint64)
    for i, row in enumerate(codes.astype(np.uint64)):
        for bit in range(bits):
            at = i * bits + bit
            words[at // 32] |= (row >> np.uint64(bit) & np.uint64(1)) << np.uint64(at % 32)
    return words.astype(np.uint32).view(np.int32)


def pack_awq(codes):
    """int32[A, N / 8] from codes [A, N], as AutoAWQ packs: nibble i of a word is the output that the order names."""
    words = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for i, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= codes[:, output::8].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def made(k, n, bits, group_size, *, dtype=np.float16, sym=False, seed=0):
    """codes [K, N], zero points [G, N], scales [G, N], and each input's group."""
    rng = np.random.default_rng(seed)
    groups = -(-k // group_size)
    zeros = rng.integers(0, 2**bits, (groups, n)) if not sym else np.full((groups, n), 2 ** (bits - 1))
    # Of at most 11 bits, in whatever dtype: so that float32 holds every weight.
    scales = rng.uniform(0.001, 0.1, (groups, n)).astype(np.float16).astype(dtype)
    return rng.integers(0, 2**bits, (k, n)), zeros, scales, np.arange(k, dtype=np.int32) // group_size


def formula(codes, zeros, scales, groups):
    """float64[N, K]: scales * (code - zero), as both packages define a weight."""
    return (scales.astype(np.float64)[groups] * (codes - zeros[groups])).T


def save(path, tensors, config, file="config.json"):
    path.mkdir(exist_ok=True)
    layout = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in tensors.items()}
    safetensors.write(path / "model.safetensors", layout, tensors.items(), {"format": "pt"})
    (path / file).write_text(json.dumps(config))
    return path


def save_gptq(path, codes, zeros, scales, groups, bits, group_size, *, version=1, g_idx=True, sym=False, **config):
    stored = zeros if version == 2 else zeros - 1 & 2**bits - 1
    tensors = {
        "a.qweight": pack_rows(codes, bits),
        "a.qzeros": np.ascontiguousarray(pack_rows(stored.T, bits).T),
        "a.scales": scales,
        "a.bias": np.ones(3, np.float16),
    } | ({"a.g_idx": groups.astype(np.int32)} if g_idx else {})
    fields = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": sym}
    layout = {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    return save(path, tensors, {"quantization_config": fields | layout | config})


@pytest.fixture(params=[None, 1])
def pieces(request, monkeypatch):
    """Layers read whole, and a few rows at a time."""
    if request.param is not None:
        monkeypatch.setattr(zero_points, "_PIECE", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_gptq_exactly(tmp_path, bits, group_size, version):
    k, n = 384, 96
    codes, zeros, scales, groups = made(k, n, bits, k if group_size == -1 else group_size)
    assert (zeros.min() == 0 and zeros.max() == 2**bits - 1) or bits == 8  # both ends of the zero points occur
    path = save_gptq(tmp_path, codes, zeros, scales, groups, bits, group_size, version=version, g_idx=version == 1)
    loaded = checkpoints.load(path)
    assert set(loaded) == {"a.weight", "a.bias"}
    qw = loaded["a.weight"]
    assert qw.shape == (n, k) and qw.bits == bits and qw.group_size == (128 if group_size == -1 else group_size)
    assert np.array_equal(codes_of(qw), codes.T)
    assert qw.scales.dtype == np.float32
    np.testing.assert_array_equal(dense(qw), formula(codes, zeros, scales, groups))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_a_symmetric_gptq_keeps_its_scales(tmp_path, dtype):
    arrays = made(256, 32, 4, 64, dtype=dtype, sym=True)
    qw = checkpoints.load(save_gptq(tmp_path, *arrays, 4, 64, sym=True))["a.weight"]
    assert qw.scales.dtype == dtype
    np.testing.assert_array_equal(dense(qw), formula(*arrays))


@pytest.mark.parametrize(
    "group_size, k, ours", [(16, 64, 16), (96, 192, 32), (192, 384, 64), (1024, 2048, 128), (128, 192, 64)]
)
def test_any_group_size(tmp_path, group_size, k, ours):
    arrays = made(k, 32, 4, group_size)
    qw = checkpoints.load(save_gptq(tmp_path, *arrays, 4, group_size))["a.weight"]
    assert qw.group_size == ours
    np.testing.assert_array_equal(dense(qw), formula(*arrays))


@pytest.mark.parametrize("dtype, unit", [(np.float16, 2.0**-11), (ml_dtypes.bfloat16, 2.0**-8)])
def test_narrower_scales_lose_what_is_said(tmp_path, dtype, unit):
    arrays = made(256, 32, 4, 64)
    qw = checkpoints.load(save_gptq(tmp_path, *arrays, 4, 64), scale_dtype=dtype)["a.weight"]
    assert qw.scales.dtype == dtype
    expected = formula(*arrays)
    # Rounding a scale and a bias costs each at most `unit` of itself, the scale nothing in float16; code and zero point
    # are at most 15. float32 adds 2**-23 of the same terms, float16's subnormals nothing: the least bias is 0.001.
    terms = 15 * np.repeat(arrays[2].astype(np.float64), 64, axis=0).T
    bound = terms * ((1 if dtype == np.float16 else 2) * unit + 2.0**-22)
    error = np.abs(dense(qw) - expected)
    assert np.all(error <= bound) and error.max() > 0


def test_a_config_that_says_symmetric_of_what_is_not(tmp_path):
    path = save_gptq(tmp_path, *made(256, 32, 4, 64), 4, 64, sym=True)
    with pytest.raises(CheckpointError, match=r"'a\.weight': is not symmetric, .* pass scale_dtype"):
        checkpoints.load(path)
    assert checkpoints.load(path, scale_dtype=np.float32)["a.weight"].bits == 4


def test_biases_beyond_float16(tmp_path):
    codes, zeros, scales, groups = made(64, 32, 4, 64)
    path = save_gptq(tmp_path, codes, zeros, scales + np.float16(2e4), groups, 4, 64)
    with pytest.raises(CheckpointError, match=r"'a\.weight': .* beyond float16"):
        checkpoints.load(path, scale_dtype=np.float16)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("bits", [3, 4])
def test_unordered_groups_are_refused_or_dequantized(tmp_path, bits):
    codes, zeros, scales, groups = made(2048, 32, bits, 64)
    groups = np.random.default_rng(1).permutation(groups)
    path = save_gptq(tmp_path, codes, zeros, scales, groups, bits, 64, desc_act=True)
    with pytest.raises(CheckpointError, match=r"'a\.weight': .*desc_act.* dequantize=True"):
        checkpoints.load(path)
    assert set(checkpoints.load(path, select="bias")) == {"a.bias"}
    loaded = checkpoints.load(path, dequantize=True)["a.weight"]
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, formula(codes, zeros, scales, groups))


def test_desc_act_with_groups_in_order_loads(tmp_path):
    arrays = made(256, 32, 4, 64)
    qw = checkpoints.load(save_gptq(tmp_path, *arrays, 4, 64, desc_act=True))["a.weight"]
    np.testing.assert_array_equal(dense(qw), formula(*arrays))


def test_overrides_by_layer_speak_by_their_shapes(tmp_path):
    arrays = made(256, 32, 8, 64)
    path = save_gptq(tmp_path, *arrays, 8, 64)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= {"bits": 4, "group_size": 128, "dynamic": {"+:a.*": {"bits": 8, "group_size": 64}}}
    (path / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(dense(checkpoints.load(path)["a.weight"]), formula(*arrays))


def test_a_config_beside(tmp_path):
    arrays = made(256, 32, 4, 64)
    path = save_gptq(tmp_path, *arrays, 4, 64)
    (path / "config.json").write_text("{}")
    (path / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 64, "desc_act": False, "sym": False})
    )
    assert checkpoints.open(path).format == "gptq"
    np.testing.assert_array_equal(dense(checkpoints.load(path)["a.weight"]), formula(*arrays))


# ---- AWQ


def save_awq(path, codes, zeros, scales, group_size, **config):
    tensors = {
        "a.qweight": pack_awq(codes),
        "a.qzeros": pack_awq(zeros),
        "a.scales": scales,
        "n": np.ones(2, np.float16),
    }
    fields = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return save(path, tensors, {"quantization_config": fields | config})


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_awq_exactly(tmp_path, group_size):
    k, n = 256, 1032
    codes, zeros, scales, groups = made(k, n, 4, k if group_size == -1 else group_size)
    loaded = checkpoints.load(save_awq(tmp_path, codes, zeros, scales, group_size))
    assert set(loaded) == {"a.weight", "n"}
    qw = loaded["a.weight"]
    assert np.array_equal(codes_of(qw), codes.T) and qw.scales.dtype == np.float32
    np.testing.assert_array_equal(dense(qw), formula(codes, zeros, scales, groups))


def test_awq_in_float16(tmp_path):
    codes, zeros, scales, groups = made(256, 32, 4, 64)
    qw = checkpoints.load(save_awq(tmp_path, codes, zeros, scales, 64), scale_dtype=np.float16)["a.weight"]
    assert same_bits(qw.scales, scales.T)
    # Each bias is rounded by 2**-11 of itself at most, and float32 adds 2**-22 of the terms; see above.
    bound = 15 * np.repeat(scales.astype(np.float64), 64, axis=0).T * (2.0**-11 + 2.0**-22)
    error = np.abs(dense(qw) - formula(codes, zeros, scales, groups))
    assert np.all(error <= bound) and error.max() > 0


def test_awq_of_its_own_config(tmp_path):
    codes, zeros, scales, _ = made(256, 32, 4, 64)
    path = save_awq(tmp_path, codes, zeros, scales, 64)
    (path / "config.json").write_text("{}")
    (path / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 64, "version": "GEMM"}))
    assert checkpoints.open(path).format == "awq"


# ---- files and configs that lie


def changed(path, change, config=None):
    tensors, metadata = safetensors.read_headers(path)
    arrays = change({name: tensor.read() for name, tensor in tensors.items()})
    layout = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
    safetensors.write(path / "model.safetensors", layout, arrays.items(), metadata)
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({"quantization_config": fields["quantization_config"] | (config or {})})
    )


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def having(name, make):
    return lambda tensors: tensors | {name: np.ascontiguousarray(make(tensors.get(name)))}


SAME = lambda tensors: tensors  # noqa: E731


@pytest.mark.parametrize(
    "change, config, message",
    [
        (without("a.scales"), {}, r"'a\.\w+': a\.scales is missing"),
        (without("a.qzeros"), {}, r"'a\.\w+': a\.qzeros is missing"),
        (without("a.qweight"), {}, r"'a\.\w+': a\.qweight is missing"),
        (having("a.qweight", lambda w: w.view(np.float32)), {}, r"'a\.qweight': has dtype float32"),
        (having("a.scales", lambda s: s.view(np.int16)), {}, r"'a\.scales': has dtype int16"),
        (having("a.qweight", lambda w: w[0]), {}, r"'a\.qweight': has shape"),
        (having("a.qweight", lambda w: w[:, :0]), {}, r"'a\.qweight': is empty"),
        (having("a.qweight", lambda w: w[:-1]), {}, r"'a\.qweight': its g_idx is int32\[256\]"),
        (
            having("a.qzeros", lambda z: z[:, :-1]),
            {},
            r"'a\.qweight': 32 words of 3 bits are no whole",
        ),
        (having("a.qzeros", lambda z: z[:-1]), {}, r"'a\.qweight': its scales have shape"),
        (having("a.scales", lambda s: s[:, :-1]), {}, r"'a\.qweight': its scales have shape"),
        (having("a.g_idx", lambda g: g + 1), {}, r"'a\.g_idx': names a group"),
        (having("a.g_idx", lambda g: g - 1), {}, r"'a\.g_idx': names a group"),
        (having("a.g_idx", lambda g: g.astype(np.int64)), {}, r"'a\.qweight': its g_idx is int64"),
        (having("a.weight", lambda _: np.ones(2)), {}, r"'a\.weight': stands beside"),
        (SAME, {"bits": 8}, r"'a\.weight': has 4 bits by its shapes, but the config says 8"),
        (SAME, {"bits": "4"}, r"'a\.weight': has 4 bits by its shapes, but the config says 4"),
        (SAME, {"group_size": 32}, r"'a\.weight': has 4 groups in rows of 256, but the config says group_size=32"),
        (SAME, {"group_size": 0}, r"group_size=0"),
        (SAME, {"group_size": None, "dynamic": None}, None),
        (SAME, {"group_size": [64]}, r"group_size=\[64\]"),
        (SAME, {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read"),
        (SAME, {"checkpoint_format": []}, "checkpoint_format"),
        (SAME, {"quant_method": "awq", "version": "gemv"}, "AWQ version 'gemv' is not read"),
        (SAME, {"quant_method": "awq"}, r"'a\.qweight': .* bits; AWQ has 4|'a\.qweight': its zero points"),
        (SAME, {"quant_method": "bitsandbytes"}, "'bitsandbytes' is not read"),
    ],
)
def test_layers_that_lie_are_refused_before_they_are_read(tmp_path, change, config, message):
    path = save_gptq(tmp_path, *made(256, 32, 4, 64), 4, 64)
    changed(path, change, config)
    if message is None:
        assert len(checkpoints.open(path)) == 2
        return
    with pytest.raises(CheckpointError, match=message):
        checkpoints.open(path)


def test_a_group_size_that_16_does_not_divide(tmp_path):
    path = save_gptq(tmp_path, *made(96, 32, 4, 24), 4, 24)
    with pytest.raises(CheckpointError, match=r"'a\.weight': has groups of 24 in rows of 96; 16 must divide"):
        gptq.open(path)
