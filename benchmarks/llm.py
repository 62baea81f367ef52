"""A whole model of the shape of Qwen3-0.6B with random weights, 4 bits in groups of 64: tokens per second, batch 1.

    python benchmarks/llm.py [--engines jaxq,jax-bf16,...] [--context 512] [--steps 16] [--rounds 5] [--check]

The engines take turns, a few tokens each, so that whatever else the machine does falls on all of them; reported are
medians, and their ratios to jaxq's. `of limit`: to the speed that reading the engine's weights once per token would
allow, at the rate at which two threads read memory in the same rounds (limits.cc; without a C++ compiler the column
is left out). With --check, the figures that are promised
are held, and the exit status says whether.

Engines: jaxq; jax-f32 and jax-bf16, the same weights dense in the same code; mlx-lm on MLX's CPU backend; llama-q4_0
and llama-q4_1, which write a GGUF file and run it in llama.cpp through llama-cpp-python. Those not installed are left
out, by name. `matmuls`: the products of a decoding step alone, each over its own weights, in one program; what a step
takes beyond them is the rest of the model. `memory`: a process of its own loads the model from a checkpoint, runs the
prompt and decodes, with the settings of the example's commands; counted is what it has resident, less what it had after
importing JAX and compiling a tiny program.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from jaxq import checkpoints
from jaxq.lowerings import cpu

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.limits import Limits
from benchmarks.llm_weights import QWEN3_06B, SPEC, random_tensors, write_gguf
from examples.llm import measure, memory
from examples.llm.config import from_json
from examples.llm.load import build, load

# ---- engines: each has prefill() and decode(), which return seconds per prompt and per token


class Jax:
    """The example's own code; `dense` gives the dtype of dense weights, None keeps them quantized."""

    def __init__(self, raw: dict[str, Any], tensors: dict[str, Any], args: Any, dense: Any = None):
        config, dtype = from_json(raw), dense or jnp.bfloat16
        if dense is not None:
            tensors = {n: t.dequantize(dense) if jaxq.is_quantized(t) else t for n, t in tensors.items()}
        params = build(config, tensors, dtype=dtype)
        self.weights = measure.nbytes(params)
        self.runner = measure.Runner(config, params, prompt=args.context, steps=args.steps, dtype=dtype)
        self.prefill, self.decode = self.runner.prefill, self.runner.decode


class Matmuls:
    """The quantized products of one step, one after the other, each waiting for the one before."""

    def __init__(self, raw: dict[str, Any], tensors: dict[str, Any], args: Any):
        params = build(from_json(raw), tensors, dtype=jnp.bfloat16)
        (segment,) = params["segments"]
        stacks = [
            w
            for name in ("qkv", "out", "gate_up", "down")
            for w in jax.tree.leaves(segment[name], is_leaf=jaxq.is_quantized)
        ]
        self.operands = stacks, params.get("head", params["embed"])
        self.weights, self.steps = measure.nbytes(self.operands), args.steps
        self.program = jax.jit(self._chain)

    def _chain(self, stacks: list[Any], head: Any) -> jax.Array:
        def product(tie: jax.Array, w: Any, number: Any = None) -> jax.Array:
            x = 1 + tie * jnp.ones((1, w.shape[-1]), jnp.bfloat16)
            return jaxq.quantized_matmul(x, w, index=number)[:, :1] * 1e-30

        def layer(tie: jax.Array, number: Any) -> Any:
            return functools.reduce(functools.partial(product, number=number), stacks, tie), None

        def step(tie: jax.Array, _: Any) -> Any:
            tie, _ = jax.lax.scan(layer, tie, jnp.arange(len(stacks[0])))
            return product(tie, head), None

        return jax.lax.scan(step, jnp.zeros((1, 1), jnp.bfloat16), length=self.steps)[0]

    def prefill(self) -> None:
        return None

    def decode(self) -> float:
        began = time.perf_counter()
        self.program(*self.operands).block_until_ready()
        return (time.perf_counter() - began) / self.steps


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
    """llama.cpp on random weights in Q4_0 or Q4_1 (int8 activations), from a GGUF file made for the purpose."""

    def __init__(self, raw: dict[str, Any], tensors: dict[str, Any], args: Any, kind: str):
        import llama_cpp

        path = Path(tempfile.mkdtemp()) / "model.gguf"
        write_gguf(path, raw, kind)
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


ENGINES = {
    "jaxq": (Jax, None, {}),
    "matmuls": (Matmuls, None, {}),
    "jax-bf16": (Jax, None, {"dense": jnp.bfloat16}),
    "jax-f32": (Jax, None, {"dense": jnp.float32}),
    "mlx-lm": (MlxLm, "mlx_lm", {}),
    "llama-q4_0": (LlamaCpp, "llama_cpp", {"kind": "Q4_0"}),
    "llama-q4_1": (LlamaCpp, "llama_cpp", {"kind": "Q4_1"}),
}


# ---- memory


def resident_memory(raw: dict[str, Any], tensors: dict[str, Any], args: Any) -> dict[str, int]:
    """Bytes: `base`, `weights`, `cache` and `resident` of a process that loads a checkpoint, prefills and decodes."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoints.mlx.save(Path(directory) / "model", tensors, config=raw)
        options = ["--context", str(args.context), "--steps", str(args.steps)]
        command = [sys.executable, __file__, "--memory-of", str(Path(directory) / "model"), *options]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def memory_of(path: Path, args: Any) -> dict[str, int]:
    memory.frugal()
    jax.jit(lambda x: x @ x)(jnp.ones((8, 8))).block_until_ready()
    base = memory.resident()
    config, params = load(path)
    runner = measure.Runner(config, params, prompt=args.context, steps=args.steps, dtype=jnp.bfloat16)
    runner.prefill(), runner.decode()
    memory.release()
    runner.prefill(), runner.decode()
    counted = {"base": base, "weights": measure.nbytes(params), "cache": measure.nbytes(runner.cache)}
    return counted | {"resident": memory.resident()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=QWEN3_06B["num_hidden_layers"])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(memory_of(args.memory_of, args)))
        return 0
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
    memory = resident_memory(raw, tensors, args) if "jaxq" in engines else None
    del tensors
    gc.collect()
    print(f"{os.cpu_count()} CPUs, jax {jax.__version__}, {jaxq.implementations()['cpu']}")
    results = Results(*rounds(args, engines), {name: engine.weights for name, engine in engines.items()}, memory)
    report(args, results)
    if not args.check:
        return 0
    failed = list(broken_promises(args, results))
    print("\n".join(failed) or "all promised figures hold")
    return 1 if failed else 0


@dataclasses.dataclass(frozen=True)
class Results:
    """Seconds per token of decode and of prefill, by engine, and bytes per second, a list each over the rounds.

    bandwidth: empty where it can't be measured.
    """

    decode: dict[str, list[float]]
    prefill: dict[str, list[float]]
    bandwidth: list[float]
    weights: dict[str, int]
    memory: dict[str, int] | None

    def step(self, name: str) -> float:
        return statistics.median(self.decode[name])

    def share(self, name: str) -> float | None:
        """Of the speed that reading the weights once a token would allow."""
        if not self.bandwidth:
            return None
        return self.weights[name] / statistics.median(self.bandwidth) / self.step(name)

    def per_prompt_token(self, name: str) -> float:
        return statistics.median(self.prefill[name])


def rounds(args: Any, engines: dict[str, Any]) -> tuple[dict[str, list[float]], dict[str, list[float]], list[float]]:
    """Seconds per token of decode and of prefill, and bytes per second, a list each over the rounds."""
    decode: dict[str, list[float]] = {name: [] for name in engines}
    prefill: dict[str, list[float]] = {name: [] for name in engines}
    bandwidth, limits = [], Limits()
    for _ in range(args.rounds):
        for name, engine in engines.items():
            if (seconds := engine.prefill()) is not None:
                prefill[name].append(seconds / args.context)
        # What is set against each other, steps, products and reading, follows closely.
        if limits.available:
            bandwidth.append(limits.measure(2, 512)[0])
        for name, engine in engines.items():
            decode[name].append(engine.decode())
    return decode, prefill, bandwidth


def report(args: Any, found: Results) -> None:
    if found.bandwidth:
        speed = statistics.median(found.bandwidth)
        print(f"two threads read {speed / 1e9:.1f} GB/s (median of {args.rounds} rounds)")
    else:
        print("no C++ compiler: how fast two threads read memory is not known, nor what share of it an engine reaches")
    limit = f"{'of limit':>9s}" if found.bandwidth else ""
    print(f"{'engine':12s}{'MiB':>6s}{'decode/s':>10s}{limit}{'ratio':>7s}{'prefill/s':>11s}{'ratio':>7s}")
    for name in found.decode:
        step = found.step(name)
        line = f"{name:12s}{found.weights[name] / 2**20:6.0f}{1 / step:10.2f}"
        if (share := found.share(name)) is not None:
            line += f"{share:9.0%}"
        line += f"{found.step('jaxq') / step:7.2f}" if "jaxq" in found.decode else ""
        if found.prefill[name]:
            each = found.per_prompt_token(name)
            line += f"{1 / each:11.1f}"
            line += f"{found.per_prompt_token('jaxq') / each:7.2f}" if "jaxq" in found.decode else ""
        print(line)
    if {"jaxq", "matmuls"} <= set(found.decode):
        rest = 1 - found.step("matmuls") / found.step("jaxq")
        print(f"of a step of jaxq's, {rest:.0%} is no product with weights")
    if found.memory:
        mebi = {name: value / 2**20 for name, value in found.memory.items()}
        took = mebi["resident"] - mebi["base"]
        ratio = (took - mebi["cache"]) / mebi["weights"]
        print(f"resident while decoding: {mebi['resident']:.0f} MiB, {mebi['base']:.0f} of them before the model,")
        print(
            f"weights {mebi['weights']:.0f}, cache {mebi['cache']:.0f}; without base and cache {ratio:.2f} times these"
        )


def broken_promises(args: Any, found: Results) -> Iterator[str]:
    """What does not hold of what is promised, for the engines that ran."""
    if (share := found.share("jaxq")) is not None and share < 0.7:
        yield f"decode: {share:.0%} of what reading the weights allows, below 70%"
    for name in ("llama-q4_0", "llama-q4_1"):
        if name in found.decode and found.step("jaxq") > found.step(name):
            yield f"decode: {found.step(name) / found.step('jaxq'):.2f} of the speed of {name}"
    if "matmuls" in found.decode and (rest := 1 - found.step("matmuls") / found.step("jaxq")) > 0.15:
        yield f"decode: {rest:.0%} of a step is no product with weights, above 15%"
    prefill = found.per_prompt_token("jaxq")
    if "jax-bf16" in found.prefill and (ratio := found.per_prompt_token("jax-bf16") / prefill) < 5:
        yield f"prefill: {ratio:.1f} times the speed of the dense model's in bfloat16, below 5"
    if "cpu:amx" in cpu.variants() and prefill > 1 / 1000:
        yield f"prefill: {1 / prefill:.0f} tokens/s on a machine with AMX, below 1000"
    if found.memory:
        allowed = found.memory["base"] + 1.15 * found.memory["weights"] + found.memory["cache"]
        if found.memory["resident"] > allowed:
            over = (found.memory["resident"] - allowed) / 2**20
            yield f"memory: {over:.0f} MiB above 1.15 of the weights, the cache and the process before the model"


if __name__ == "__main__":
    sys.exit(main())
