"""Models of the shape of Qwen3-0.6B with random weights, for benchmarks/llm.py: tensors, and GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from examples.llm.config import from_json

QWEN3_06B = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
SPEC = jaxq.QuantSpec(4, 64)


def random_tensors(raw: dict[str, Any]) -> dict[str, Any]:
    """Quantized weights by Hugging Face's names; outputs of the usual size, so that bfloat16 stays in range."""
    config = from_json(raw)
    rng = np.random.default_rng(0)
    hidden, inner = config.hidden_size, config.intermediate_size

    def matrix(rows: int, columns: int) -> jaxq.QuantizedArray:
        packed = rng.integers(0, 2**32, (rows, SPEC.words(columns)), np.uint32)
        scales = (rng.uniform(0.5, 1.5, (rows, SPEC.groups(columns))) * 0.2 * columns**-0.5).astype(jnp.bfloat16)
        biases = (scales.astype(np.float32) * -7.5).astype(jnp.bfloat16)
        leaves = [jnp.asarray(leaf) for leaf in (packed, scales, biases)]
        return jaxq.QuantizedArray.from_packed(*leaves, bits=SPEC.bits, group_size=SPEC.group_size)

    def ones(size: int) -> jax.Array:
        return jnp.ones(size, jnp.bfloat16)

    shapes = {
        "self_attn.q_proj": (config.q_size, hidden),
        "self_attn.k_proj": (config.kv_size, hidden),
        "self_attn.v_proj": (config.kv_size, hidden),
        "self_attn.o_proj": (hidden, config.q_size),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    tensors = {"model.embed_tokens.weight": matrix(config.vocab_size, hidden), "model.norm.weight": ones(hidden)}
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        tensors |= {f"{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        tensors |= {f"{layer}.{n}.weight": ones(hidden) for n in ("input_layernorm", "post_attention_layernorm")}
        tensors |= {f"{layer}.self_attn.{n}_norm.weight": ones(config.head_dim) for n in "qk"}
    return tensors


def write_gguf(path: Path, raw: dict[str, Any], kind: str) -> None:
    """The same shape in Q4_0 or Q4_1, random blocks, and a vocabulary of numbers."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_context_length(4096)
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_key_length(raw["head_dim"])
    writer.add_value_length(raw["head_dim"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(raw["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(raw["vocab_size"])])
    writer.add_token_types([1] * raw["vocab_size"])
    writer.add_token_merges(["t 0"])
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        blocks = rng.integers(0, 256, (rows, columns // 32, {"Q4_0": 18, "Q4_1": 20}[kind]), np.uint8)
        scales = (rng.uniform(0.5, 1.5, (rows, columns // 32, 1)) * 0.2 * columns**-0.5).astype(np.float16)
        blocks[..., :2] = scales.view(np.uint8)
        if kind == "Q4_1":  # the smallest value of each block
            blocks[..., 2:4] = (scales * np.float16(-7.5)).view(np.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType[kind])

    hidden, inner, dim = raw["hidden_size"], raw["intermediate_size"], raw["head_dim"]
    q, kv = raw["num_attention_heads"] * dim, raw["num_key_value_heads"] * dim
    matrix("token_embd.weight", raw["vocab_size"], hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for i in range(raw["num_hidden_layers"]):
        for name, rows, columns in (
            *(("attn_q", q, hidden), ("attn_k", kv, hidden), ("attn_v", kv, hidden), ("attn_output", hidden, q)),
            *(("ffn_gate", inner, hidden), ("ffn_up", inner, hidden), ("ffn_down", hidden, inner)),
        ):
            matrix(f"blk.{i}.{name}.weight", rows, columns)
        for name, size in (("attn_norm", hidden), ("ffn_norm", hidden), ("attn_q_norm", dim), ("attn_k_norm", dim)):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
