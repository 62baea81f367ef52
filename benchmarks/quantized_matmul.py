"""Products of x[M, 4096] with one weight of 4096 x 4096: every implementation against JAX's dense product and mlx.core.

    python benchmarks/quantized_matmul.py
    python benchmarks/quantized_matmul.py --rows 1 --only mlx --seconds 60   # the cost of going through JAX

Every round times each contender once, in an order that rotates, so that whatever else the machine does hits all alike.
Printed are medians, their ratios to the dense float32 product, and the bytes of weight, x and result that went through
per second. `mlx.core` is MLX called directly, on arrays that it holds already; compare it with "mlx, resident".
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxq
from jaxq.lowerings import mlx as mlx_lowering


@dataclasses.dataclass
class Contender:
    name: str
    call: Callable[[], Any]  # returns when the result is there
    nbytes: int
    times: list[float] = dataclasses.field(default_factory=list)

    def run(self) -> float:
        start = time.perf_counter()
        self.call()
        return time.perf_counter() - start


def contenders(x: jax.Array, w: jax.Array, spec: jaxq.QuantSpec, residencies: list[Any]) -> list[Contender]:
    """Everything that can run here. `residencies` keeps alive what MLX holds."""
    moved = x.nbytes + x.shape[0] * w.shape[0] * x.dtype.itemsize
    qw = jaxq.quantize(w.astype(x.dtype), bits=spec.bits, group_size=spec.group_size, mode=spec.mode)
    product = jax.jit(lambda x, w: x @ w.T)
    found = []

    def add(name: str, weight: Any, nbytes: int, x: jax.Array = x, implementation: str | None = None) -> None:
        f = product
        if implementation is not None:
            f = jax.jit(lambda x, w: jaxq.quantized_matmul(x, w, implementation=implementation))
        found.append(Contender(name, lambda: jax.block_until_ready(f(x, weight)), nbytes))

    for dtype in ("float32", "bfloat16"):
        dense_x, dense_w = x.astype(dtype), w.astype(dtype)
        add(f"JAX dense {dtype}", dense_w, dense_w.nbytes + moved, x=dense_x)
    for name, state in jaxq.implementations()["cpu"].items():
        if state in ("default", "usable"):
            add(name, qw, qw.nbytes + moved, implementation=name)
        else:
            print(f"{name}: {state}")
    if mlx_lowering.unavailable() is None and mlx_lowering.refuses("quantized_matmul", spec=spec) is None:
        residency = jaxq.resident(qw)
        residencies.append(residency)
        add("mlx, resident", residency.tree, residency.nbytes + moved, implementation="mlx")
        found.append(direct(x, qw, qw.nbytes + moved))
    return found


def direct(x: jax.Array, qw: jaxq.QuantizedArray, nbytes: int) -> Contender:
    import mlx.core as mx

    def load(a: Any) -> Any:
        a = np.asarray(a)
        return mx.array(a.view(np.uint16)).view(mx.bfloat16) if a.dtype.name == "bfloat16" else mx.array(a)

    there, *leaves = [load(a) for a in (x, *qw.leaves)]
    mx.eval(there, *leaves)
    options = dict(group_size=qw.group_size, bits=qw.bits, mode=qw.mode)
    return Contender("mlx.core", lambda: mx.eval(mx.quantized_matmul(there, *leaves, **options)), nbytes)


def measure(entries: list[Contender], seconds: float, rounds: int | None) -> None:
    first = 0.0
    for entry in entries:
        entry.run()  # compiles
        first += entry.run()
    rounds = rounds or max(5, min(301, int(seconds / first)))
    for i in range(rounds):
        shift = i % len(entries)
        for entry in entries[shift:] + entries[:shift]:
            entry.times.append(entry.run())


def show(rows: int, entries: list[Contender]) -> None:
    base = statistics.median(entries[0].times)
    print(f"\nM={rows}, {len(entries[0].times)} rounds")
    print(f"{'':20} {'median us':>11} {'quartiles us':>19} {'x dense f32':>12} {'GB/s':>7}")
    for entry in entries:
        low, median, high = (float(q) for q in np.quantile(entry.times, (0.25, 0.5, 0.75)))
        print(
            f"{entry.name:20} {median * 1e6:11.1f} {low * 1e6:9.1f}-{high * 1e6:<9.1f} "
            f"{base / median:12.2f} {entry.nbytes / median / 1e9:7.2f}"
        )
    by_name = {entry.name: entry for entry in entries}
    if "mlx.core" in by_name:
        core, ours = by_name["mlx.core"].times, by_name["mlx, resident"].times
        ratio = statistics.median(ours) / statistics.median(core)
        paired = statistics.median(b / a for a, b in zip(core, ours, strict=True))
        print(f"mlx, resident / mlx.core: {ratio:.3f} of medians, {paired:.3f} median within rounds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 128], help="M")
    parser.add_argument("--size", type=int, nargs=2, default=[4096, 4096], metavar=("N", "K"))
    parser.add_argument("--bits", type=int)
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--mode", default="affine")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="of x and scales"
    )
    parser.add_argument("--seconds", type=float, default=20, help="about how long for each M; 5 rounds at least")
    parser.add_argument("--rounds", type=int, help="so many rounds, however long they take")
    parser.add_argument(
        "--only", nargs="+", default=[], help="only contenders whose names contain one of these, and dense"
    )
    options = parser.parse_args()

    spec = jaxq.QuantSpec(options.bits, options.group_size, options.mode)
    print(f"{spec}, {options.dtype}, N x K = {options.size[0]} x {options.size[1]}; jax {jax.__version__}, ", end="")
    print(f"{jax.default_backend()}, {os.cpu_count()} cores, {platform.machine()} {platform.system()}")
    w = jax.random.normal(jax.random.key(0), options.size) / np.sqrt(options.size[1])
    for rows in options.rows:
        residencies: list[Any] = []
        x = jax.random.normal(jax.random.key(1), (rows, options.size[1])).astype(options.dtype)
        entries = contenders(x, w, spec, residencies)
        if options.only:
            entries = entries[:1] + [e for e in entries[1:] if any(part in e.name for part in options.only)]
        measure(entries, options.seconds, options.rounds)
        show(rows, entries)
        for residency in residencies:
            residency.close()


if __name__ == "__main__":
    main()
