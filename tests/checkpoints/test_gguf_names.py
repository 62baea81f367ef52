"""From GGUF to a directory that mlx-lm runs: the same logits as the model that the file was written from."""

import json

import numpy as np
import pytest
from test_gguf import write

from jaxq import checkpoints
from jaxq.checkpoints import CheckpointError, gguf
from jaxq.checkpoints.gguf_names import hugging_face

mx = pytest.importorskip("mlx.core")
utils = pytest.importorskip("mlx_lm.utils")
package = pytest.importorskip("gguf")

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS, VOCABULARY = 4, 2, 16, 64, 2, 32
CONFIG = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 96,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "rope_theta": 5e5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name):
    parts = name.split(".")
    if parts[1] == "layers":
        return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:-1])]}.{parts[-1]}"
    return f"{NAMES['.'.join(parts[:-1])]}.{parts[-1]}"


def paired(w, heads):
    """As llama.cpp's converter reorders the rows of queries and keys of the llama family."""
    return w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def divisors(factor):
    """As that converter writes Llama 3's scaling: a loop over frequencies with three cases."""
    out = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * CONFIG["rope_theta"] ** (i / HEAD_DIM)
        if wavelength < 8192 / 4:
            out.append(1.0)
        elif wavelength > 8192 / 1:
            out.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def model_of(family, scaling=None):
    """An mlx-lm model of random weights, and its weights in NumPy."""
    config = CONFIG | {"model_type": family} | ({"rope_scaling": scaling} if scaling else {})
    model_class, arguments = utils._get_classes(config)
    mx.random.seed(0)
    model = model_class(arguments.from_dict(config))
    from mlx.utils import tree_flatten

    return model, {name: np.array(array) for name, array in tree_flatten(model.parameters())}


def write_model(path, family, weights, scaling=None):
    metadata = [
        ("add_block_count", LAYERS),
        ("add_context_length", 128),
        ("add_embedding_length", HIDDEN),
        ("add_feed_forward_length", 96),
        ("add_head_count", HEADS),
        ("add_head_count_kv", KV_HEADS),
        ("add_key_length", HEAD_DIM),
        ("add_layer_norm_rms_eps", 1e-5),
        ("add_rope_freq_base", 5e5),
        ("add_eos_token_id", 7),
    ]
    tensors = {}
    for name, w in weights.items():
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            w = paired(w, HEADS if "q_proj" in name else KV_HEADS)
        quantized = w.ndim == 2 and w.shape[1] % 32 == 0
        w = np.ascontiguousarray(w, np.float32)
        kind = package.GGMLQuantizationType.Q8_0
        tensors[gguf_name(name)] = ("Q8_0", package.quantize(w, kind)) if quantized else w
    if scaling:
        tensors["rope_freqs.weight"] = divisors(scaling["factor"])
    return write(path, tensors, metadata, family)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("family, scaling", [("llama", None), ("llama", LLAMA3), ("qwen2", None), ("qwen3", None)])
def test_mlx_lm_runs_what_becomes_of_a_gguf_file(tmp_path, family, scaling):
    model, weights = model_of(family, scaling)
    path = write_model(tmp_path / "x.gguf", family, weights, scaling)
    checkpoints.convert(gguf.open(path, scale_dtype=np.float32), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == config | CONFIG | {"eos_token_id": 7, "model_type": family}
    assert config.get("rope_scaling") == scaling
    converted, _ = utils.load_model(tmp_path / "out")
    # The reference: the model itself, on the weights that the file holds.
    held = {}
    for name, w in weights.items():
        if w.ndim == 2:
            kind = package.GGMLQuantizationType.Q8_0
            w = package.dequantize(package.quantize(np.ascontiguousarray(w, np.float32), kind), kind)
        held[name] = mx.array(w)
    model.load_weights(list(held.items()))
    tokens = mx.array([[1, 5, 9, 30, 2, 2, 17]])
    expected, found = np.array(model(tokens)), np.array(converted(tokens))
    # The weights are the same to the last bit; products differ in the order of their float32 sums, of at most 96
    # terms, through 2 layers of 7 products each: 14 * 96 * 2**-24 of the largest logit, with a factor of 4 for norms.
    assert np.abs(found - expected).max() <= 4 * 14 * 96 * 2.0**-24 * np.abs(expected).max()


def test_another_architecture(tmp_path):
    path = write(tmp_path / "x.gguf", {"w": np.ones(3, np.float32)}, (), "mamba")
    with pytest.raises(CheckpointError, match="architecture 'mamba'"):
        hugging_face(gguf.open(path))


@pytest.mark.parametrize("name", ["blk.0.attn_qkv.weight", "blk.x.attn_q.weight", "other"])
def test_a_tensor_without_a_name(tmp_path, name):
    _, weights = model_of("llama")
    write_model(tmp_path / "x.gguf", "llama", weights)
    source = gguf.open(tmp_path / "x.gguf")
    source.entries[name] = source.entries["output_norm.weight"]
    with pytest.raises(CheckpointError, match=f"tensor '{name}': has no name"):
        hugging_face(source)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("llama.block_count", None, r"llama\.block_count are missing"),
        ("llama.block_count", "2", r"llama\.block_count are 2"),
        ("llama.attention.head_count", 0, "0 heads"),
        ("llama.attention.key_length", 48, "heads of 48"),
        ("llama.rope.scaling.type", "su", "rope scaling 'su'"),
    ],
)
def test_metadata_that_lie(tmp_path, key, value, message):
    _, weights = model_of("llama")
    source = gguf.open(write_model(tmp_path / "x.gguf", "llama", weights))
    source.config[key] = value
    with pytest.raises(CheckpointError, match=message):
        hugging_face(source)
