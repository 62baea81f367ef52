"""MLX directories: against mlx.core and mlx-lm, both ways, bit for bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import MLX_FORMATS, same_bits

import jaxq
from jaxq.checkpoints import Checkpoint, CheckpointError, mlx, safetensors

mx = pytest.importorskip("mlx.core")


def to_numpy(array):
    return np.asarray(array.view(mx.uint16)).view(jnp.bfloat16) if array.dtype == mx.bfloat16 else np.asarray(array)


def quantized(key, shape=(8, 256), *, bits=None, group_size=None, mode="affine"):
    """A bf16 weight as MLX quantizes it, or as we do where MLX can't."""
    if mode == "affine" and group_size == 16:
        return jaxq.quantize(jax.random.normal(jax.random.key(key), shape, jnp.bfloat16), bits=bits, group_size=16)
    spec = jaxq.QuantSpec(bits, group_size, mode)
    w = mx.random.normal(shape, dtype=mx.bfloat16, key=mx.random.key(key))
    parts = mx.quantize(w, bits=spec.bits, group_size=spec.group_size, mode=mode)
    return jaxq.QuantizedArray(*(jnp.asarray(to_numpy(part)) for part in parts), spec=spec)


def name_of(spec):
    return f"{spec['mode']}{spec['bits']}g{spec['group_size']}"


def mlx_directory(path, tensors, quantization):
    mx.save_safetensors(str(path / "model.safetensors"), tensors, {"format": "mlx"})
    (path / "config.json").write_text(json.dumps({"model_type": "x", "quantization": quantization}))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("spec", MLX_FORMATS, ids=name_of)
def test_load_what_mlx_saves(tmp_path, spec, dtype):
    w = mx.random.normal((2, 6, 256), dtype=getattr(mx, dtype), key=mx.random.key(0))
    parts = dict(zip(("weight", "scales", "biases"), mx.quantize(w, **spec), strict=False))
    norm = mx.random.normal((6,), dtype=getattr(mx, dtype))
    mlx_directory(tmp_path, {f"a.b.{part}": array for part, array in parts.items()} | {"norm.weight": norm}, spec)
    loaded = mlx.open(tmp_path).load()
    assert set(loaded) == {"a.b.weight", "norm.weight"}
    qw = loaded["a.b.weight"]
    assert qw.shape == (2, 6, 256) and qw.spec == jaxq.QuantSpec(**spec) and isinstance(qw.packed, jax.Array)
    assert same_bits(loaded["norm.weight"], to_numpy(norm))
    for leaf, part in zip(qw.leaves, ("weight", "scales", "biases"), strict=False):
        assert same_bits(leaf, to_numpy(parts[part]))


@pytest.mark.parametrize("spec", MLX_FORMATS, ids=name_of)
def test_mlx_loads_what_we_save(tmp_path, spec):
    qw = quantized(0, **spec)
    mlx.save(tmp_path / "m", {"a.b.weight": qw, "norm.weight": jnp.ones(8)}, {"model_type": "x"})
    loaded = mx.load(str(tmp_path / "m" / "model.safetensors"))
    assert set(loaded) == {"a.b.weight", "a.b.scales", "norm.weight"} | ({"a.b.biases"} if qw.spec.is_affine else set())
    for leaf, part in zip(qw.leaves, ("weight", "scales", "biases"), strict=False):
        assert same_bits(leaf, to_numpy(loaded[f"a.b.{part}"]))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == spec and config["model_type"] == "x"


def test_overrides_by_layer_and_several_files(tmp_path):
    tensors = {
        "a.weight": quantized(0, bits=4, group_size=64),
        "b.weight": quantized(1, bits=4, group_size=64),
        "c.weight": quantized(2, bits=8, group_size=32),
        "d.weight": quantized(3, mode="mxfp4"),
        "e.weight": jnp.arange(4, dtype=jnp.bfloat16),
    }
    mlx.save(tmp_path / "m", tensors, shard_bytes=3000)
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    fields = json.loads((tmp_path / "m" / "config.json").read_text())["quantization"]
    assert fields == {
        "bits": 4,
        "group_size": 64,
        "mode": "affine",
        "c": {"bits": 8, "group_size": 32, "mode": "affine"},
        "d": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    }
    loaded = mlx.open(tmp_path / "m").load()
    for name, tensor in tensors.items():
        assert jax.tree.structure(loaded[name]) == jax.tree.structure(tensor)
        assert jax.tree.all(jax.tree.map(same_bits, loaded[name], tensor))


def test_an_open_checkpoint_is_saved_as_it_is_read(tmp_path):
    tensors = {"a.weight": quantized(0, bits=3, group_size=32), "b.bias": jnp.ones(3, jnp.float16)}
    mlx.save(tmp_path / "m", tensors)
    checkpoint = mlx.open(tmp_path / "m")
    assert isinstance(checkpoint, Checkpoint) and checkpoint.entries["a.weight"].kind == "int3g32"
    mlx.save(tmp_path / "n", checkpoint, checkpoint.config)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "m" / file).read_bytes() == (tmp_path / "n" / file).read_bytes()


def test_a_single_file(tmp_path):
    mlx.save(tmp_path / "m", {"a.weight": quantized(0, bits=4)})
    path = tmp_path / "m" / "model.safetensors"
    assert mlx.open(path).load()["a.weight"].bits == 4
    path.rename(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"'a\.weight': has scales, but the config has no `quantization`"):
        mlx.open(tmp_path / "x.safetensors").load()
    config = {"quantization": {"bits": 4, "group_size": 64}}
    assert mlx.open(tmp_path / "x.safetensors", config=config).load()["a.weight"].bits == 4


def test_scales_that_belong_to_no_quantized_layer_are_plain_tensors(tmp_path):
    arrays = {"x.scales": np.ones(3, np.float32), "y.biases": np.ones(3, np.float32)}
    mlx.save(tmp_path / "m", arrays)
    assert set(mlx.open(tmp_path / "m").load()) == set(arrays)


# ---- mlx-lm, the program that reads these


def tiny(seed=0):
    qwen3 = pytest.importorskip("mlx_lm.models.qwen3")
    config = {
        "model_type": "qwen3",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-6,
        "vocab_size": 96,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_theta": 1e4,
        "head_dim": 32,
        "tie_word_embeddings": False,
    }
    mx.random.seed(seed)
    return qwen3.Model(qwen3.ModelArgs.from_dict(config)), config


@pytest.mark.parametrize("bits", [4, 8, "mixed", "mxfp4"])
def test_mlx_lm_both_ways(tmp_path, bits):
    utils = pytest.importorskip("mlx_lm.utils")
    model, config = tiny()

    def predicate(path, module):
        if not hasattr(module, "to_quantized"):
            return False
        if bits == "mixed":
            return {"bits": 8 if "down_proj" in path else 3, "group_size": 32} if "embed" not in path else False
        return True

    mode = bits if isinstance(bits, str) and bits != "mixed" else "affine"
    size = {"group_size": 32 if mode != "affine" else 64, "bits": bits if isinstance(bits, int) else 4}
    model, config = utils.quantize_model(model, config, **size, mode=mode, quant_predicate=predicate)
    utils.save_model(str(tmp_path / "m"), model)
    utils.save_config(config, tmp_path / "m" / "config.json")

    checkpoint = mlx.open(tmp_path / "m")
    mlx.save(tmp_path / "n", checkpoint, checkpoint.config)
    again, _ = utils.load_model(tmp_path / "n")
    tokens = mx.array([[1, 2, 3, 4]])
    assert same_bits(np.asarray(again(tokens)), np.asarray(model(tokens)))
    loaded = mx.load(str(tmp_path / "n" / "model.safetensors"))
    for name, array in mx.load(str(tmp_path / "m" / "model.safetensors")).items():
        assert same_bits(to_numpy(array), to_numpy(loaded[name]))


# ---- files and configs that lie


def broken(path, change, quantization=None):
    """A directory with one 4-bit layer `a` and one dense tensor, its tensors changed by `change`."""
    qw = quantized(0, bits=4, group_size=64)
    tensors = {"a.weight": qw.packed, "a.scales": qw.scales, "a.biases": qw.biases, "n.weight": jnp.ones(2)}
    tensors = {name: np.asarray(array) for name, array in change(tensors).items()}
    layout = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in tensors.items()}
    safetensors.write(path / "model.safetensors", layout, tensors.items())
    quantization = {"bits": 4, "group_size": 64} if quantization is None else quantization
    (path / "config.json").write_text(json.dumps({"quantization": quantization}))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {k: v for k, v in t.items() if k != "a.weight"}, r"'a\.(scales|biases)': a\.weight is missing"),
        (lambda t: {k: v for k, v in t.items() if k != "a.scales"}, r"'a\.\w+': a\.scales is missing"),
        (lambda t: {k: v for k, v in t.items() if k != "a.biases"}, r"'a\.weight': its biases are missing"),
        (lambda t: t | {"a.weight": t["a.weight"].view(jnp.int32)}, r"'a\.weight': .*int32; it must be uint32"),
        (lambda t: t | {"a.weight": t["a.weight"][:, :-1]}, r"'a\.weight': .*31 words"),
        (lambda t: t | {"a.scales": t["a.scales"][:-1]}, r"'a\.weight': .*scales\.shape=\(7, 4\)"),
        (lambda t: t | {"a.scales": t["a.scales"].view(jnp.uint16)}, r"'a\.weight': .*scales\.dtype=uint16"),
        (lambda t: t | {"a.biases": t["a.biases"].astype(jnp.float32)}, r"'a\.weight': .*biases are float32"),
    ],
)
def test_layers_that_lie_are_refused_before_they_are_read(tmp_path, monkeypatch, change, message):
    broken(tmp_path, change)
    monkeypatch.setattr(safetensors.Tensor, "read", lambda self: pytest.fail("it was read"))
    with pytest.raises(CheckpointError, match=message):
        mlx.open(tmp_path).load()


@pytest.mark.parametrize(
    "quantization, message",
    [
        ({"bits": 8, "group_size": 64}, r"'a\.weight': contradicts"),
        ({"bits": 4, "group_size": 32}, r"'a\.weight': contradicts"),
        ({"bits": 4, "group_size": 64, "a": {"bits": 2, "group_size": 64}}, r"'a\.weight': contradicts"),
        ({"bits": 7, "group_size": 64}, r"'a\.weight': config\.json: .*bits=7 is not legal"),
        ({"bits": "4", "group_size": 64}, r"'a\.weight': config\.json: .*bits='4'"),
        ({"bits": 4, "group_size": 64, "mode": []}, r"'a\.weight': config\.json: .*mode='\[\]'"),
        ({"bits": 4, "group_size": 64, "a": False}, r"'a\.weight': has scales, but the config has False"),
        ({"mode": "mxfp4"}, r"'a\.weight': contradicts.*biases"),
        ([], "quantization is .*no JSON object"),
    ],
)
def test_a_config_that_lies_is_refused(tmp_path, quantization, message):
    broken(tmp_path, lambda tensors: tensors, quantization)
    with pytest.raises(CheckpointError, match=message):
        mlx.open(tmp_path).load()


@pytest.mark.parametrize(
    "name, make, message",
    [
        ("a.kernel", lambda: quantized(0, bits=4), "not named"),
        ("a.weight", lambda: quantized(0, bits=4).T, r"has axis=\(-2,\)"),
        ("a.weight", lambda: quantized(0, bits=4, group_size=16), "no groups of 16"),
    ],
)
def test_what_mlx_can_not_hold_is_not_written(tmp_path, name, make, message):
    with pytest.raises(ValueError, match=message):
        mlx.save(tmp_path / "m", {name: make()})
    assert list(tmp_path.iterdir()) == []


def test_groups_of_16_are_written_on_request(tmp_path):
    qw = quantized(0, bits=6, group_size=16)
    mlx.save(tmp_path / "m", {"a.weight": qw}, mlx_only=False)
    assert jax.tree.all(jax.tree.map(same_bits, mlx.open(tmp_path / "m").load()["a.weight"], qw))
