"""Run a language model on quantized weights.

    python -m examples.llm generate   MODEL --prompt "def main(" [--bits 4] [--temperature 0.7] [--top-p 0.9]
    python -m examples.llm perplexity MODEL TEXT [--bits 4]
    python -m examples.llm bench      MODEL [--bits 4] [--prompt-tokens 512] [--steps 64]

MODEL is a directory of Hugging Face's or MLX's, or a GGUF file. Dense weights are quantized where --bits or --mode asks
for it. Without a MODEL that exists, "pystdlib" is the small one that ships with the example.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from examples.llm import generation, measure, memory, tokenizer
from examples.llm.load import load, quantize_with
from examples.llm.sampling import Sampling

SHIPPED = Path(__file__).parent / "pystdlib"


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    memory.frugal()
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def generate(args: argparse.Namespace) -> int:
    config, params = _load(args)
    words = tokenizer.load(args.model)
    prompt = words.encode(args.prompt)
    print(args.prompt, end="", flush=True)
    began, count = time.perf_counter(), 0

    tokens = generation.generate(
        config,
        params,
        prompt,
        max_tokens=args.max_tokens,
        sampling=Sampling(args.temperature, args.top_p),
        seed=args.seed,
        dtype=_dtype(args),
    )

    def counted() -> Iterator[int]:
        nonlocal count
        for token in tokens:
            count += 1
            yield token

    for piece in words.stream(counted()):
        print(piece, end="", flush=True)
    took = time.perf_counter() - began
    print(f"\n[{len(prompt)} tokens in, {count} out, {took:.1f} s with compilation]", file=sys.stderr)
    return 0


def perplexity(args: argparse.Namespace) -> int:
    config, params = _load(args)
    text = args.text.read_text()
    ids = np.array(tokenizer.load(args.model).encode(text))
    length = min(args.window, len(ids) - 1)
    count = (len(ids) - 1) // length
    windows = np.stack([ids[i * length : (i + 1) * length + 1] for i in range(count)])
    nats = generation.cross_entropy(config, params, windows, dtype=_dtype(args), batch=1)
    bits = nats * len(ids) / len(text.encode()) / math.log(2)
    print(f"perplexity {math.exp(nats):.4f} per token, {bits:.4f} bits per byte, {count} windows of {length} tokens")
    return 0


def bench(args: argparse.Namespace) -> int:
    config, params = _load(args)
    found = measure.speed(
        config, params, prompt=args.prompt_tokens, steps=args.steps, repeats=args.repeats, dtype=_dtype(args)
    )
    print(f"prefill  {found.prefill:10.1f} tokens/s ({args.prompt_tokens} tokens)")
    print(f"decode   {found.decode:10.1f} tokens/s (after {args.prompt_tokens} tokens)")
    print(f"weights  {found.weights / 2**20:10.1f} MiB")
    print(f"cache    {found.cache / 2**20:10.1f} MiB")
    print(f"resident {found.resident / 2**20:10.1f} MiB")
    return 0


def _load(args: argparse.Namespace) -> Any:
    quantizer = None
    if args.bits or args.group_size or args.mode != "affine":
        quantizer = quantize_with(args.bits, args.group_size, args.mode)
    return load(args.model, dtype=_dtype(args), quantizer=quantizer)


def _dtype(args: argparse.Namespace) -> Any:
    return jnp.dtype(args.dtype)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m examples.llm", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    for run, extra in (
        (generate, (("--prompt", "import "), ("--max-tokens", 256), ("--temperature", 0.0), ("--top-p", 1.0))),
        (perplexity, (("--window", 256),)),
        (bench, (("--prompt-tokens", 128), ("--steps", 64), ("--repeats", 5))),
    ):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        command.add_argument("model", type=lambda name: SHIPPED if name == "pystdlib" else Path(name))
        if run is perplexity:
            command.add_argument("text", type=Path, help="a file of text")
        for name, value in extra:
            command.add_argument(name, type=type(value), default=value)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the activations")
        command.add_argument("--bits", type=int)
        command.add_argument("--group-size", type=int)
        command.add_argument("--mode", default="affine", choices=["affine", "mxfp4", "mxfp8", "nvfp4"])
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
