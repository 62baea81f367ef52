"""Checkpoints to parameters: a Hugging Face or MLX directory, or a GGUF file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


def load(path: str | Path, *, dtype: Any = jnp.bfloat16, quantizer: Quantizer | None = None) -> tuple[Config, Params]:
    """A model from a directory with `config.json` and safetensors, or from a GGUF file.

    Args:
      dtype: of the activations; dense weights are converted to it. Quantized ones stay as they are in the file.
      quantizer: (name, dense weight) -> what to use in its place; see `quantize_with`.

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
    return config, build(config, tensors, dtype=dtype, quantizer=quantizer)


def quantize_with(bits: int | None, group_size: int | None = None, mode: str = "affine") -> Quantizer:
    """A quantizer for every matrix, embedding and head with it, whose rows the groups divide, as mlx-lm has it."""
    spec = jaxq.QuantSpec(bits, group_size, mode)  # type: ignore[arg-type]

    def quantizer(name: str, weight: Any) -> Any:
        if weight.shape[-1] % spec.length_multiple:
            return weight
        return jaxq.quantize(weight, bits=spec.bits, group_size=spec.group_size, mode=spec.mode)  # type: ignore[arg-type]

    return quantizer


def build(config: Config, tensors: Mapping[str, Any], *, dtype: Any, quantizer: Quantizer | None = None) -> Params:
    """Parameters as `model.py` wants them from tensors by name; each is asked for once, when its turn comes.

    Args:
      tensors: {name: array or QuantizedArray}, in Hugging Face's names or GGUF's. A `Checkpoint` will do.
      dtype: of the dense weights.
      quantizer: for the dense matrices.
    """
    reader = _Reader(config, tensors, dtype, quantizer)
    params: Params = {"embed": reader.matrix("embed", None, (config.vocab_size, config.hidden_size))}
    if not config.tie_embeddings:
        params["head"] = reader.matrix("head", None, (config.vocab_size, config.hidden_size))
    params["norm"] = reader.vector("norm", None, config.hidden_size)
    params["segments"] = tuple(_segments(map(reader.layer, range(config.num_layers)), config.num_layers))
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
            rows = _split_pairs(shape[0], self.config.head_dim)
            weight = jax.tree.map(lambda leaf: np.asarray(leaf)[rows], weight)
        return weight if jaxq.is_quantized(weight) else weight.astype(self.dtype)

    def layer(self, i: int) -> Params:
        """Layer i, with `_Rows` for leaves."""
        config, hidden = self.config, self.config.hidden_size
        layer: Params = {}
        for ours in _NORMS:
            head = ours in ("q_norm", "k_norm")
            if not head or config.has_qk_norm:
                layer[ours] = _Rows([self.vector(ours, i, config.head_dim if head else hidden)])
        shapes = {
            "qkv": [(config.q_size, hidden), (config.kv_size, hidden), (config.kv_size, hidden)],
            "out": [(hidden, config.q_size)],
            "gate_up": [(config.intermediate_size, hidden)] * 2,
            "down": [(hidden, config.intermediate_size)],
        }
        for ours, wanted in shapes.items():
            parts = [self.matrix(ours, i, shape, part) for part, shape in enumerate(wanted)]
            layer[ours] = _fuse(parts) if ours in _FUSED else _fuse(parts)[0]
            names = [self.name(_PROJECTIONS[ours][part], i, "bias") for part in range(len(parts))]
            required = config.family == "qwen2" and ours == "qkv"
            if required or any(name in self.tensors for name in names):
                biases = [
                    self.bias(name, shape[0], ours, p)
                    for p, (name, shape) in enumerate(zip(names, wanted, strict=True))
                ]
                layer[f"{ours}_bias"] = _Rows(biases)
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


class _Rows:
    """An array in pieces, which come to stand one after the other along the first axis."""

    def __init__(self, pieces: Sequence[Any]):
        self.pieces = pieces
        self.shape = (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])
        self.dtype = pieces[0].dtype

    def write(self, out: np.ndarray) -> None:
        np.concatenate([np.asarray(piece) for piece in self.pieces], out=out)


def _fuse(parts: list[Any]) -> tuple[Any, ...]:
    """Neighbours of one format as one weight with `_Rows` for leaves: their outputs stand side by side."""
    groups: list[list[Any]] = []
    for part in parts:
        if groups and _signature(groups[-1][0]) == _signature(part):
            groups[-1].append(part)
        else:
            groups.append([part])
    # QuantizedArrays of one format concatenate leaf by leaf: rows are the axis before the last in every leaf.
    return tuple(jax.tree.map(lambda *leaves: _Rows(leaves), *group) for group in groups)


def _signature(weight: Any) -> Any:
    """Equal for weights whose rows can stand in one array."""
    return jax.tree.structure(weight), [(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(weight)]


def _segments(layers: Iterable[Params], count: int) -> Iterator[Params]:
    """Runs of layers whose leaves have the same shapes and formats, stacked.

    Each layer is written to its place in the stacks as it comes, so that memory holds one layer more than the result.
    """
    run: _Run | None = None
    for number, layer in enumerate(layers):
        if run is not None and not run.fits(layer):
            yield run.stacks()
            run = None
        run = run or _Run(layer, count - number)
        run.append(layer)
    if run is not None:
        yield run.stacks()


class _Run:
    """Stacks that grow, of at most `room` layers like the one given. What is not written takes no memory.

    They are NumPy's, in memory that JAX on a CPU adopts: programs that XLA compiles to join arrays, one a shape, would
    stay in memory with two megabytes each.
    """

    def __init__(self, layer: Params, room: int):
        self.like, self.count = self._shapes(layer), 0
        self.leaves = [empty((room, *shape), dtype) for shape, dtype in self.like[1]]

    @staticmethod
    def _shapes(layer: Params) -> Any:
        return jax.tree.structure(layer), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(layer)]

    def fits(self, layer: Params) -> bool:
        return self._shapes(layer) == self.like

    def append(self, layer: Params) -> None:
        for leaf, rows in zip(self.leaves, jax.tree.leaves(layer), strict=True):
            rows.write(leaf[self.count])
        self.count += 1

    def stacks(self) -> Params:
        leaves = []
        while self.leaves:
            leaf = self.leaves.pop(0)
            if self.count < len(leaf):  # the huge page in which it ends would be held whole
                leaf, longer = empty((self.count, *leaf.shape[1:]), leaf.dtype), leaf
                np.copyto(leaf, longer[: self.count])
            leaves.append(jax.device_put(leaf))
        return jax.tree.unflatten(self.like[0], leaves)
