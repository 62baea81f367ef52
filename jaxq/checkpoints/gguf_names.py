"""GGUF's names and metadata in Hugging Face's words, for the families whose layers map one to one.

Sources: llama.cpp's `gguf-py/gguf/tensor_mapping.py` and `convert_hf_to_gguf.py`; ggml's `docs/gguf.md` for the keys.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxq.checkpoints.entries import Checkpoint, Entry
from jaxq.checkpoints.files import refuse

# general.architecture -> (model_type, the class that transformers has for it)
FAMILIES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FREQUENCIES = "rope_freqs.weight"
# The values of factor that Llama 3.1 and 3.2 have; their other three numbers are the same.
_LLAMA3_FACTORS = (8.0, 32.0, 16.0, 4.0)
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def hugging_face(source: Checkpoint) -> Checkpoint:
    """A GGUF checkpoint by Hugging Face's names, with a `config.json`'s config; nothing is read but `rope_freqs`.

    Rows of queries and keys that a converter reordered (llama) come back in their own order; codes and scales stay.

    Raises:
      CheckpointError: another architecture than llama, qwen2 and qwen3, metadata that are missing, a tensor that these
        families don't have.
    """
    architecture = source.config.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        what = (
            f"architecture {str(architecture)[:100]!r} has no names of Hugging Face's here; {', '.join(FAMILIES)} have"
        )
        raise refuse(source.path, what)
    config = _config(source, architecture)
    entries = {}
    for name, entry in source.entries.items():
        if name == _FREQUENCIES:
            continue
        renamed = _rename(source, name)
        if architecture == "llama" and re.search(r"\.(q|k)_proj\.", renamed):
            entry = _unpaired(source, name, entry, config["head_dim"])
        entries[renamed] = entry
    return Checkpoint(source.path, source.format, config, entries)


def _rename(source: Checkpoint, name: str) -> str:
    found = re.fullmatch(r"(?:blk\.(\d{1,6})\.)?([a-z_]+)\.(weight|bias)", name)
    if found:
        layer, kind, suffix = found.groups()
        theirs = _TOP.get(kind) if layer is None else _LAYER.get(kind)
        if theirs is not None:
            return f"{theirs}.{suffix}" if layer is None else f"model.layers.{layer}.{theirs}.{suffix}"
    raise refuse(source.path, "has no name of Hugging Face's", name)


def _unpaired(source: Checkpoint, name: str, entry: Entry, head_dim: int) -> Entry:
    """The entry with each head's rows in Hugging Face's order.

    GGUF has the two coordinates that a rotation pairs side by side; Hugging Face has them half a head apart.
    """
    rows = entry.shape[0]
    if rows % head_dim or head_dim % 2:
        raise refuse(source.path, f"has {rows} rows, in heads of {head_dim}", name)
    order = np.arange(rows).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
    return dataclasses.replace(entry, read=lambda: [leaf[order] for leaf in entry.read()])


def _config(source: Checkpoint, architecture: str) -> dict[str, Any]:
    """The fields of a `config.json` that transformers and mlx-lm read."""
    metadata = source.config
    number = _numbers(source, architecture)
    model_type, class_name = FAMILIES[architecture]
    hidden, heads = number("embedding_length", int), number("attention.head_count", int)
    embedding = source.entries.get("token_embd.weight")
    if embedding is None:
        raise refuse(source.path, "is missing", "token_embd.weight")
    if not 0 < heads <= hidden:
        raise refuse(source.path, f"{heads} heads in {hidden} dimensions")
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "num_hidden_layers": number("block_count", int),
        "intermediate_size": number("feed_forward_length", int),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", int, heads),
        "head_dim": number("attention.key_length", int, hidden // heads),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon", float),
        "rope_theta": number("rope.freq_base", float, 10000.0),
        "max_position_embeddings": number("context_length", int, 4096),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in source.entries,
    }
    for ours, theirs in (
        ("eos_token_id", "tokenizer.ggml.eos_token_id"),
        ("bos_token_id", "tokenizer.ggml.bos_token_id"),
    ):
        if isinstance(metadata.get(theirs), int):
            config[ours] = metadata[theirs]
    scaling = _rope_scaling(source, number, config)
    return config | ({"rope_scaling": scaling} if scaling else {})


def _numbers(source: Checkpoint, architecture: str) -> Any:
    def number(key: str, kind: type, default: Any = None) -> Any:
        value = source.config.get(f"{architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            found = "missing" if value is None else f"{str(value)[:100]}, no number"
            raise refuse(source.path, f"the metadata {architecture}.{key} are {found}")
        # A float of the file is a float32: the shortest decimal that means it is what its writer had.
        return int(value) if kind is int else float(str(np.float32(value)))

    return number


def _rope_scaling(source: Checkpoint, number: Any, config: Mapping[str, Any]) -> dict[str, Any] | None:
    if _FREQUENCIES in source.entries:
        return _llama3(source, config)
    kind = source.config.get(f"{source.config['general.architecture']}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise refuse(source.path, f"rope scaling {str(kind)[:100]!r} has no words in a config here")
    scaling = {"rope_type": kind, "factor": number("rope.scaling.factor", float)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = number("rope.scaling.original_context_length", int)
    return scaling


def _llama3(source: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling, whose parameters a GGUF file has turned into a divisor per frequency."""
    entry = source.entries[_FREQUENCIES]
    if entry.is_quantized or entry.abstract.dtype != np.float32 or entry.shape != (config["head_dim"] // 2,):
        raise refuse(source.path, "is no float32 vector of half a head", _FREQUENCIES)
    divisors = entry.read()[0]
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(len(divisors)) * 2 / config["head_dim"])
    low, high, context = _LLAMA3.values()
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    for factor in _LLAMA3_FACTORS:
        # Source: transformers' `_compute_llama3_parameters`: frequencies are mixed from f / factor and f.
        expected = 1 / ((1 - smooth) / factor + smooth)
        if np.allclose(divisors, expected, rtol=1e-4):
            return {"rope_type": "llama3", "factor": factor} | _LLAMA3
    raise refuse(source.path, "are none of Llama 3's divisors of frequencies", _FREQUENCIES)
