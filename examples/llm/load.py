"""Checkpoints to parameters: a Hugging Face or MLX directory, or a GGUF file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from examples.llm import config as configs
from examples.llm.config import Config, RopeScaling
from examples.llm.model import Params
from jaxq import checkpoints
from jaxq.checkpoints.files import empty

# Ours -> Hugging Face's and GGUF's. The names of parts that a product serves together stand in its order.
_TOP = {
    "embed": ("model.embed_tokens", "token_embd"),
    "norm": ("model.norm", "output_norm"),
    "head": ("lm_head", "output"),
}
_NORMS = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "k_norm": ("self_attn.k_norm", "attn_k_norm"),
}
_PROJECTIONS = {
    "qkv": (
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
    ),
    "out": (("self_attn.o_proj", "attn_output"),),
    "gate_up": (("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up")),
    "down": (("mlp.down_proj", "ffn_down"),),
}
_FUSED = ("qkv", "gate_up")

Quantizer = Callable[[str, Any], Any]


def load(
    path: str | Path, *, dtype: Any = jnp.bfloat16, quantizer: Quantizer | None = None, stacked: bool = False
) -> tuple[Config, Params]:
    """A model from a directory with `config.json` and safetensors, or from a GGUF file.

    Args:
      dtype: of the activations; dense weights are converted to it. Quantized ones stay as they are in the file.
      quantizer: (name, dense weight) -> what to use in its place; see `quantize_with`.
      stacked: see `build`.

    Raises:
      ValueError: a family or a setting that is not supported, a tensor that is missing or of a wrong shape.
    """
    tensors = checkpoints.open(path)
    if tensors.format == "gguf":
        config = configs.from_gguf(tensors.config, tied="output.weight" not in tensors)
        if "rope_freqs.weight" in tensors:
            factors = tuple(float(f) for f in np.asarray(tensors["rope_freqs.weight"]))
            config = dataclasses.replace(config, rope_scaling=RopeScaling("factors", factors=factors))
    else:
        config = configs.from_json(tensors.config)
    return config, build(config, tensors, dtype=dtype, quantizer=quantizer, stacked=stacked)


def quantize_with(bits: int | None, group_size: int | None = None, mode: str = "affine") -> Quantizer:
    """A quantizer for every matrix, embedding and head with it, whose rows the groups divide, as mlx-lm has it."""
    spec = jaxq.QuantSpec(bits, group_size, mode)  # type: ignore[arg-type]

    def quantizer(name: str, weight: Any) -> Any:
        if weight.shape[-1] % spec.length_multiple:
            return weight
        return jaxq.quantize(weight, bits=spec.bits, group_size=spec.group_size, mode=spec.mode)  # type: ignore[arg-type]

    return quantizer


def build(
    config: Config,
    tensors: Mapping[str, Any],
    *,
    dtype: Any,
    quantizer: Quantizer | None = None,
    stacked: bool = False,
) -> Params:
    """Parameters as `model.py` wants them from tensors by name; each is asked for once, when its turn comes.

    Args:
      tensors: {name: array or QuantizedArray}, in Hugging Face's names or GGUF's. A `Checkpoint` will do.
      dtype: of the dense weights.
      quantizer: for the dense matrices.
      stacked: layers of one format under one `lax.scan`: a program that compiles faster. Without, each layer is a
        segment of its own: a kernel then reads the weights where they lie, while a scan copies the slice of each
        layer before the kernel sees it, which on a CPU costs more than the product itself.
    """
    reader = _Reader(config, tensors, dtype, quantizer)
    params: Params = {"embed": reader.matrix("embed", None, (config.vocab_size, config.hidden_size))}
    if not config.tie_embeddings:
        params["head"] = reader.matrix("head", None, (config.vocab_size, config.hidden_size))
    params["norm"] = reader.vector("norm", None, config.hidden_size)
    layers = [reader.layer(i) for i in range(config.num_layers)]
    params["segments"] = tuple(_segments(layers) if stacked else (_stack([layer]) for layer in layers))
    return params


class _Reader:
    """Tensors by our names, checked."""

    def __init__(self, config: Config, tensors: Mapping[str, Any], dtype: Any, quantizer: Quantizer | None):
        self.config, self.tensors, self.dtype, self.quantizer = config, tensors, dtype, quantizer
        self.gguf = "token_embd.weight" in tensors

    def name(self, names: tuple[str, str], layer: int | None, suffix: str) -> str:
        prefix = "" if layer is None else f"blk.{layer}." if self.gguf else f"model.layers.{layer}."
        return f"{prefix}{names[self.gguf]}.{suffix}"

    def read(self, name: str, shape: tuple[int, ...]) -> Any:
        if name not in self.tensors:
            raise ValueError(f"load: the checkpoint has no tensor {name!r}, which this {self.config.family} needs")
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"load: tensor {name!r} has shape {tuple(tensor.shape)}; the config asks for {shape}")
        return tensor

    def vector(self, ours: str, layer: int | None, size: int) -> jax.Array:
        names = _NORMS[ours] if ours in _NORMS else _TOP[ours]
        return jnp.asarray(self.read(self.name(names, layer, "weight"), (size,)))

    def matrix(self, ours: str, layer: int | None, shape: tuple[int, int], part: int = 0) -> Any:
        names = _TOP[ours] if layer is None else _PROJECTIONS[ours][part]
        name = self.name(names, layer, "weight")
        weight = self.read(name, shape)
        if not jaxq.is_quantized(weight):
            weight = jnp.asarray(weight)
            weight = self.quantizer(name, weight) if self.quantizer else weight
        if self.gguf and self.config.family == "llama" and ours == "qkv" and part < 2:
            rows = jnp.asarray(_split_pairs(shape[0], self.config.head_dim))
            weight = jax.tree.map(lambda leaf: leaf[rows], weight)
        return weight if jaxq.is_quantized(weight) else weight.astype(self.dtype)

    def layer(self, i: int) -> Params:
        config, hidden = self.config, self.config.hidden_size
        layer: Params = {}
        for ours in _NORMS:
            head = ours in ("q_norm", "k_norm")
            if not head or config.has_qk_norm:
                layer[ours] = self.vector(ours, i, config.head_dim if head else hidden)
        shapes = {
            "qkv": [(config.q_size, hidden), (config.kv_size, hidden), (config.kv_size, hidden)],
            "out": [(hidden, config.q_size)],
            "gate_up": [(config.intermediate_size, hidden)] * 2,
            "down": [(hidden, config.intermediate_size)],
        }
        for ours, wanted in shapes.items():
            parts = [self.matrix(ours, i, shape, part) for part, shape in enumerate(wanted)]
            layer[ours] = _fuse(parts) if ours in _FUSED else parts[0]
            names = [self.name(_PROJECTIONS[ours][part], i, "bias") for part in range(len(parts))]
            required = config.family == "qwen2" and ours == "qkv"
            if required or any(name in self.tensors for name in names):
                biases = [
                    self.bias(name, shape[0], ours, p)
                    for p, (name, shape) in enumerate(zip(names, wanted, strict=True))
                ]
                layer[f"{ours}_bias"] = _join(biases)
        return layer

    def bias(self, name: str, size: int, ours: str, part: int) -> jax.Array:
        value = jnp.asarray(self.read(name, (size,)))
        if self.gguf and self.config.family == "llama" and ours == "qkv" and part < 2:
            value = value[_split_pairs(size, self.config.head_dim)]
        return value


def _split_pairs(rows: int, head_dim: int) -> np.ndarray:
    """Which row of a GGUF file's stands where in Hugging Face's order, per head.

    Files of the llama family hold the two coordinates of a rotated pair side by side; here, as in Hugging Face's files,
    coordinate i turns with i + head_dim / 2. Source: llama.cpp's convert_hf_to_gguf.py, `LlamaModel.permute`.
    """
    return np.arange(rows).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _fuse(parts: list[Any]) -> tuple[Any, ...]:
    """Neighbours of one format as one weight: their outputs stand side by side."""
    groups: list[list[Any]] = []
    for part in parts:
        if groups and _signature(groups[-1][0]) == _signature(part):
            groups[-1].append(part)
        else:
            groups.append([part])
    # QuantizedArrays of one format concatenate leaf by leaf: rows are the axis before the last in every leaf.
    return tuple(jax.tree.map(lambda *leaves: _join(leaves), *group) for group in groups)


def _join(leaves: Sequence[Any]) -> jax.Array:
    """Concatenated along the first axis.

    By NumPy, into memory that JAX on a CPU adopts: each program that XLA compiles for this, one a shape, would stay
    in memory with two megabytes.
    """
    if len(leaves) == 1:
        return leaves[0]
    out = empty((sum(leaf.shape[0] for leaf in leaves), *leaves[0].shape[1:]), leaves[0].dtype)
    np.concatenate([np.asarray(leaf) for leaf in leaves], out=out)
    return jax.device_put(out)


def _signature(weight: Any) -> Any:
    """Equal for weights whose rows can stand in one array."""
    return jax.tree.structure(weight), [(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(weight)]


def _segments(layers: list[Params]) -> Iterator[Params]:
    """Runs of layers whose leaves have the same shapes and formats, stacked."""

    def shapes(layer: Params) -> Any:
        return jax.tree.structure(layer), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(layer)]

    run: list[Params] = []
    for layer in layers:
        if run and shapes(run[-1]) != shapes(layer):
            yield _stack(run)
            run = []
        run.append(layer)
    yield _stack(run)


def _stack(layers: list[Params]) -> Params:
    if len(layers) == 1:  # a new first axis is a view where a stack would be a copy
        return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[None]), layers[0])
    return jax.tree.map(lambda *leaves: _join([np.asarray(leaf)[None] for leaf in leaves]), *layers)
