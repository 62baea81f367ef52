"""What a decoder looks like, by the `config.json` of Hugging Face and MLX or by the metadata of a GGUF file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FAMILIES = ("qwen3", "qwen2", "llama")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context that the model was trained on; see `rope.py`.

    kind: "linear", "llama3", "yarn", or "factors": one divisor per frequency, as GGUF files have them. The other fields
    are those of Hugging Face's `rope_scaling`.
    """

    kind: str
    factor: float = 1.0
    original_max_position: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3", "yarn", "factors"):
            raise ValueError(f"RopeScaling: kind={self.kind!r} is unknown; linear, llama3 and yarn are supported")
        if not self.factor > 0:
            raise ValueError(f"RopeScaling: factor={self.factor}; it must be positive")


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder-only transformer. Hashable, so that it can be a static argument of `jax.jit`."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"Config: family={self.family!r} is not supported; pick one of {', '.join(FAMILIES)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or value <= 0):
                raise ValueError(f"Config: {field.name}={value!r}; it must be a positive int")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"Config: num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"Config: head_dim={self.head_dim} is odd; rotary embeddings turn pairs")

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalized per head."""
        return self.family == "qwen3"

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def from_json(config: Mapping[str, Any] | Path) -> Config:
    """From a `config.json`, parsed or as a path.

    Raises:
      ValueError: a `model_type` that is not supported, a field that is missing or absurd, sliding-window attention.
    """
    if isinstance(config, Path):
        config = json.loads(config.read_text())
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        if config.get("use_sliding_window") and config.get("sliding_window"):
            raise ValueError("from_json: use_sliding_window=true is not supported")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"from_json: hidden_act={config['hidden_act']!r} is not supported; only silu is")
        return Config(
            family=config["model_type"],
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            max_position=config.get("max_position_embeddings", 4096),
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=_rope_theta(config),
            rope_scaling=_rope_scaling(config),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            eos_ids=_ids(config.get("eos_token_id")),
            bos_id=config.get("bos_token_id"),
        )
    except KeyError as error:
        raise ValueError(f"from_json: the config has no {error.args[0]!r}") from None


def _ids(value: Any) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (int(value),)


def _rope_theta(config: Mapping[str, Any]) -> float:
    # transformers 5 moved the base into `rope_parameters`.
    return float(config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or 10000.0)


def _rope_scaling(config: Mapping[str, Any]) -> RopeScaling | None:
    given = config.get("rope_scaling") or config.get("rope_parameters")
    kind = None if not given else given.get("rope_type") or given.get("type")
    if kind in (None, "default"):
        return None
    names = {
        "original_max_position": "original_max_position_embeddings",
        **{name: name for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")},
        **{name: name for name in ("mscale", "mscale_all_dim")},
    }
    fields = {ours: given[theirs] for ours, theirs in names.items() if given.get(theirs) is not None}
    return RopeScaling(kind=kind, **fields)


_GGUF_FAMILIES = {"qwen3": "qwen3", "qwen2": "qwen2", "llama": "llama"}


def from_gguf(metadata: Mapping[str, Any], *, tied: bool) -> Config:
    """From the metadata of a GGUF file, key to value; `tied` says that the file has no `output.weight`.

    Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Files of the llama family from newer converters
    hold llama3's frequencies in the tensor `rope_freqs.weight`; `load.py` passes them on.

    Raises:
      ValueError: an architecture that is not supported, a key that is missing.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in _GGUF_FAMILIES:
        raise ValueError(
            f"from_gguf: general.architecture={architecture!r} is not supported; {', '.join(_GGUF_FAMILIES)} are"
        )

    def get(key: str, *default: Any) -> Any:
        name = f"{architecture}.{key}"
        if name not in metadata and not default:
            raise ValueError(f"from_gguf: the file has no {name!r}")
        return metadata.get(name, *default)

    heads = int(get("attention.head_count"))
    hidden = int(get("embedding_length"))
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab = get("vocab_size", len(tokens) if tokens is not None else 0)
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    return Config(
        family=_GGUF_FAMILIES[architecture],
        vocab_size=int(vocab),
        hidden_size=hidden,
        intermediate_size=int(get("feed_forward_length")),
        num_layers=int(get("block_count")),
        num_heads=heads,
        num_kv_heads=int(get("attention.head_count_kv", heads)),
        head_dim=int(get("attention.key_length", hidden // heads)),
        max_position=int(get("context_length", 4096)),
        rms_norm_eps=float(get("attention.layer_norm_rms_epsilon")),
        rope_theta=float(get("rope.freq_base", 10000.0)),
        rope_scaling=_gguf_scaling(get),
        tie_embeddings=tied,
        eos_ids=_ids(None if eos is None else int(eos)),
        bos_id=None if bos is None else int(bos),
    )


def _gguf_scaling(get: Any) -> RopeScaling | None:
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return None
    return RopeScaling(
        kind=kind,
        factor=float(get("rope.scaling.factor", 1.0)),
        original_max_position=int(get("rope.scaling.original_context_length", 8192)),
    )
