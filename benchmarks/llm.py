"""A whole model of the shape of Qwen3-0.6B with random weights, 4 bits in groups of 64: tokens per second, batch 1.

    python benchmarks/llm.py [--engines jaxq,jax-bf16,...] [--context 512] [--steps 16] [--rounds 5] [--check]

The engines take turns, a few tokens each, so that whatever else the machine does falls on all of them; reported are
medians, and their ratios to jaxq's. `of limit`: to the speed that reading the engine's weights once per token would
allow, at the rate at which two threads read memory in the same rounds. With --check, the figures that are promised
are held, and the exit status says whether.

Engines: jaxq; jax-f32 and jax-bf16, the same weights dense in the same code; mlx-lm on MLX's CPU backend; llama-q4_0,
which writes a GGUF file and runs it in llama.cpp through llama-cpp-python. Those not installed are left out, by name.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxq

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.llm import measure
from examples.llm.config import from_json
from examples.llm.load import build

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


# ---- engines: each has prefill() and decode(), which return seconds per prompt and per token


class Jax:
    """The example's own code; `dense` gives the dtype of dense weights, None keeps them quantized."""

    def __init__(self, raw: dict[str, Any], tensors: dict[str, Any], args: Any, dense: Any = None):
        config, dtype = from_json(raw), dense or jnp.bfloat16
        if dense is not None:
            tensors = {n: t.dequantize(dense) if jaxq.is_quantized(t) else t for n, t in tensors.items()}
        params = build(config, tensors, dtype=dtype, stacked=args.stacked or dense is not None)
        self.weights = measure.nbytes(params)
        self.runner = measure.Runner(config, params, prompt=args.context, steps=args.steps, dtype=dtype)
        self.prefill, self.decode = self.runner.prefill, self.runner.decode


class MlxLm:
    """mlx-lm on the same words, with float32 scales, in which MLX's CPU backend is fastest."""

    def __init__(self, raw: dict[str, Any], tensors: dict[str, Any], args: Any):
        import mlx.core as mx
        import mlx.nn as nn
        from mlx_lm.models.cache import make_prompt_cache

        architecture = importlib.import_module(f"mlx_lm.models.{raw['model_type']}")
        self.mx, self.model = mx, architecture.Model(architecture.ModelArgs.from_dict(raw))
        nn.quantize(self.model, bits=SPEC.bits, group_size=SPEC.group_size)
        weights = []
        for name, tensor in tensors.items():
            stem = name.removesuffix("weight")
            leaves = tensor.leaves if jaxq.is_quantized(tensor) else (tensor,)
            for part, leaf in zip(("weight", "scales", "biases"), leaves, strict=False):
                value = np.asarray(leaf) if leaf.dtype == jnp.uint32 else np.asarray(leaf, np.float32)
                weights.append((stem + part, mx.array(value)))
        self.model.load_weights(weights)
        self.cache = make_prompt_cache(self.model)
        self.prompt = mx.random.randint(0, raw["vocab_size"], (1, 8))  # a long one takes minutes
        self.weights = sum(leaf.nbytes for _, leaf in weights)
        self.run(self.prompt)

    def run(self, tokens: Any) -> Any:
        logits = self.model(tokens, cache=self.cache)[:, -1]
        self.mx.eval(logits)
        return self.mx.argmax(logits, axis=-1)

    def prefill(self) -> None:
        return None

    def decode(self) -> float:
        began = time.perf_counter()
        self.run(self.mx.array([[1]]))
        return time.perf_counter() - began


class LlamaCpp:
    """llama.cpp on random weights in Q4_0 (int8 activations), from a GGUF file made for the purpose."""

    def __init__(self, raw: dict[str, Any], tensors: dict[str, Any], args: Any):
        import llama_cpp

        path = Path(tempfile.mkdtemp()) / "model.gguf"
        write_gguf(path, raw)
        self.weights = path.stat().st_size
        self.steps, self.lib = args.steps, llama_cpp
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=args.context + args.steps + 64, n_batch=512, n_threads=2, n_threads_batch=2, verbose=False
        )
        path.unlink()
        self.prompt = np.random.default_rng(0).integers(0, raw["vocab_size"], args.context).tolist()

    def prefill(self) -> float:
        self.llama.reset()
        began = time.perf_counter()
        self.llama.eval(self.prompt)
        return time.perf_counter() - began

    def decode(self) -> float:
        began = time.perf_counter()
        for _ in range(self.steps):
            self.llama.eval([1])
        took = (time.perf_counter() - began) / self.steps
        self.llama.n_tokens -= self.steps
        return took


def write_gguf(path: Path, raw: dict[str, Any]) -> None:
    """The same shape in Q4_0, random blocks, and a vocabulary of numbers."""
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
        blocks = rng.integers(0, 256, (rows, columns // 32, 18), np.uint8)
        scales = (rng.uniform(0.5, 1.5, (rows, columns // 32)) * 0.2 * columns**-0.5).astype(np.float16)
        blocks[..., :2] = scales[..., None].view(np.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

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


class Bandwidth:
    """Bytes per second that two threads read from memory."""

    def __init__(self, nbytes: int = 512 << 20):
        self.halves = np.split(np.ones(nbytes // 8, np.int64), 2)
        self.nbytes, self.pool = nbytes, ThreadPoolExecutor(2)

    def __call__(self) -> float:
        began = time.perf_counter()
        list(self.pool.map(np.max, self.halves))
        return self.nbytes / (time.perf_counter() - began)


ENGINES = {
    "jaxq": (Jax, None, {}),
    "jax-bf16": (Jax, None, {"dense": jnp.bfloat16}),
    "jax-f32": (Jax, None, {"dense": jnp.float32}),
    "mlx-lm": (MlxLm, "mlx_lm", {}),
    "llama-q4_0": (LlamaCpp, "llama_cpp", {}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=QWEN3_06B["num_hidden_layers"])
    parser.add_argument("--stacked", action="store_true", help="jaxq's layers under a scan")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    raw = QWEN3_06B | {"num_hidden_layers": args.layers}
    tensors = random_tensors(raw)
    engines: dict[str, Any] = {}
    for name in args.engines.split(","):
        make, module, options = ENGINES[name]
        if module is not None and importlib.util.find_spec(module) is None:
            print(f"{name}: {module} is not installed; left out")
            continue
        engines[name] = make(raw, tensors, args, **options)
        engines[name].prefill(), engines[name].decode()
    del tensors
    gc.collect()
    print(f"{os.cpu_count()} CPUs, jax {jax.__version__}, {jaxq.implementations()['cpu']}")
    return report(args, *rounds(args, engines), {name: engine.weights for name, engine in engines.items()})


def rounds(args: Any, engines: dict[str, Any]) -> tuple[dict[str, list[float]], dict[str, list[float]], list[float]]:
    """Seconds per token of decode and of prefill, and bytes per second, a list each over the rounds."""
    decode: dict[str, list[float]] = {name: [] for name in engines}
    prefill: dict[str, list[float]] = {name: [] for name in engines}
    bandwidth, read = [], Bandwidth()
    for _ in range(args.rounds):
        bandwidth.append(read())
        for name, engine in engines.items():
            if (seconds := engine.prefill()) is not None:
                prefill[name].append(seconds / args.context)
            decode[name].append(engine.decode())
    return decode, prefill, bandwidth


def report(args: Any, decode: Any, prefill: Any, bandwidth: list[float], weights: dict[str, int]) -> int:
    speed = statistics.median(bandwidth)
    print(f"two threads read {speed / 1e9:.1f} GB/s (median of {args.rounds} rounds)")
    print(f"{'engine':12s}{'MiB':>6s}{'decode/s':>10s}{'of limit':>9s}{'ratio':>7s}{'prefill/s':>11s}{'ratio':>7s}")
    base = {"decode": statistics.median(decode["jaxq"]), "prefill": statistics.median(prefill["jaxq"])}
    for name in decode:
        step, size = statistics.median(decode[name]), weights[name]
        line = f"{name:12s}{size / 2**20:6.0f}{1 / step:10.2f}{size / speed / step:9.0%}{base['decode'] / step:7.2f}"
        if prefill[name]:
            each = statistics.median(prefill[name])
            line += f"{1 / each:11.1f}{base['prefill'] / each:7.2f}"
        print(line)
    if not args.check:
        return 0
    failed = []
    if weights["jaxq"] / speed / base["decode"] < 0.7:
        failed.append("decode is below 70% of what reading the weights allows")
    if "jax-bf16" in prefill and statistics.median(prefill["jax-bf16"]) < 5 * base["prefill"]:
        failed.append("prefill is not 5 times as fast as the dense model's in bfloat16")
    print("\n".join(failed) or "all promised figures hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
