"""Quantize the small model that ships with the example to ever fewer bits, and see what that costs and saves.

    python -m examples.llm.demo [--plot FILE]

For the model dense and in each format: bits per byte on files of the standard library that it was not trained on,
bytes, greedy tokens per second, and at the end some text by the one of 4 bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxq
from examples.llm import corpus, generation, measure, tokenizer
from examples.llm.load import load, quantize_with
from examples.llm.sampling import Sampling

SHIPPED = Path(__file__).parent / "pystdlib"
FORMATS: dict[str, dict[str, Any]] = {
    "dense f32": {},
    "dense bf16": {},
    **{f"{bits} bits": {"bits": bits, "group_size": 64} for bits in (8, 6, 4, 3, 2)},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}
STEPS = 64
PROMPT = "import os\nimport sys\n\n\ndef "


@dataclasses.dataclass
class Row:
    name: str
    weights: int
    bits_per_byte: float
    tokens_per_second: float = 0.0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_name("quality.png"))
    parser.add_argument("--windows", type=int, default=24, help="of held-out text, 512 bytes each")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    print(f"a byte-level decoder on the text of Python's standard library, {jaxq.implementations()['cpu']}\n")
    models = {name: _load(fields, name) for name, fields in FORMATS.items()}
    windows = corpus.windows(count=args.windows, length=512)
    rows = [_row(name, *model, windows) for name, model in models.items()]
    _time(models, rows)
    _print(rows)
    _sample(*models["4 bits"])
    _plot(rows, args.plot)
    print(f"{time.perf_counter() - began:.0f} seconds in all")


def _load(fields: dict[str, Any], name: str) -> tuple[Any, Any, Any]:
    """Config, parameters, and the dtype of the activations."""
    dtype = jnp.float32 if name.endswith("f32") else jnp.bfloat16
    # Layers under a scan: eight models are compiled here, and a small one fits in the cache anyway.
    config, params = load(SHIPPED, dtype=dtype, quantizer=quantize_with(**fields) if fields else None)
    return config, params, dtype


def _row(name: str, config: Any, params: Any, dtype: Any, windows: np.ndarray) -> Row:
    nats = generation.cross_entropy(config, params, windows, dtype=dtype)
    return Row(name, measure.nbytes(params), nats / math.log(2))


def _time(models: dict[str, Any], rows: list[Row], rounds: int = 5) -> None:
    """The models take turns, so that whatever else the machine does falls on all of them."""
    runners = [measure.Runner(c, p, prompt=64, steps=STEPS, dtype=d) for c, p, d in models.values()]
    seconds = [[runner.decode() for runner in runners] for _ in range(1 + rounds)][1:]  # the first round compiles
    for row, times in zip(rows, zip(*seconds, strict=True), strict=True):
        row.tokens_per_second = 1 / statistics.median(times)


def _print(rows: list[Row]) -> None:
    f32, bf16 = rows[0], rows[1]
    heads = f"{'':12s}{'KiB':>8s}{'of bf16':>9s}{'bits/byte':>11s}{'more':>8s}"
    print(heads + f"{'tokens/s':>10s}{'to f32':>8s}{'to bf16':>9s}")
    for row in rows:
        speed = row.tokens_per_second
        print(
            f"{row.name:12s}{row.weights / 1024:8.0f}{row.weights / bf16.weights:9.0%}{row.bits_per_byte:11.4f}"
            f"{row.bits_per_byte - f32.bits_per_byte:+8.4f}{speed:10.0f}{speed / f32.tokens_per_second:7.2f}x"
            f"{speed / bf16.tokens_per_second:8.2f}x"
        )


def _sample(config: Any, params: Any, dtype: Any) -> None:
    words = tokenizer.load(SHIPPED)
    tokens = generation.generate(
        config,
        params,
        words.encode(PROMPT),
        max_tokens=420,
        sampling=Sampling(temperature=0.8, top_p=0.9),
        seed=2,
        dtype=dtype,
    )
    print(f"\n4 bits, after {PROMPT!r}:\n")
    sys.stdout.write(PROMPT)
    for piece in words.stream(tokens):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print("\n")


def _plot(rows: list[Row], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot([row.weights / 1024 for row in rows], [row.bits_per_byte for row in rows], "o")
    for row in rows:
        axes.annotate(row.name, (row.weights / 1024, row.bits_per_byte), xytext=(4, 5), textcoords="offset points")
    axes.set(xlabel="KiB of weights", ylabel="bits per byte, held-out text", xscale="log", title="Quality against size")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"quality against size: {path}")


if __name__ == "__main__":
    main()
