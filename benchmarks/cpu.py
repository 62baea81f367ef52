"""Times of the CPU kernels beside other libraries', as ratios of medians from the same interleaved run.

    python benchmarks/cpu.py                                  # everything that is installed: about 10 minutes
    python benchmarks/cpu.py --cases matmul --shapes 0 --rows 1 8 --json out.json --plot out.png

Peers are optional: onnxruntime (MatMulNBits at accuracy level 0, float32, and 4, which rounds activations to int8),
openvino, torch (int4 and dense), JAX's dense product, and mlx where --peers names it. A peer that is missing is left
out and named at the end.
The case `threads` (two CPUs over one) runs threads.py in processes of its own, each bound to as many CPUs.
The functions of a case take turns, a few calls each after a first one that is dropped; medians are over all turns.
Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

if "--cpu-time" in sys.argv:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before any library counts the CPUs

import jax
import jax.numpy as jnp
import numpy as np
import peers as peer_library
from limits import Limits

import jaxq

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]  # w[N, K]
ROWS = [1, 4, 8, 16, 64, 128, 512]
OURS = "jaxq"
COLD_BYTES = 512 << 20  # more than any cache


# What a call takes, and what stands for its repetitions; --cpu-time has other ones.
clock: Callable[[], float] = time.perf_counter
summary: Callable[[list[float]], float] = np.median


def interleave(functions: dict[str, Callable[[], object]], rounds: int, budget: float = 0.02) -> dict[str, float]:
    """The seconds of each function, over `rounds` turns of at least 3 calls or `budget` seconds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            time.sleep(0.002)  # the last one's threads stop spinning
            function()
            start, taken = time.perf_counter(), 0
            while taken < 3 or time.perf_counter() - start < budget:
                before = clock()
                function()
                times[name].append(clock() - before)
                taken += 1
                if time.perf_counter() - start > 20 * budget:
                    break
    return {name: float(summary(values)) for name, values in times.items()}


def machine_limits(threads: int) -> dict[str, float]:
    """Bytes read and float32 operations per second at most, empty without a compiler."""
    limits = Limits()
    if not limits.available:
        return {}
    memory, flops = limits.measure(threads, 512)
    cache, _ = limits.measure(threads, 8)
    return {"memory_bytes_per_s": memory, "cache_bytes_per_s": cache, "float32_flops_per_s": flops}


def call(function: Callable, *operands: object) -> Callable[[], object]:
    """`function` compiled for these operands, as a call that waits for its result."""
    compiled = jax.jit(function).lower(*operands).compile()
    return lambda: compiled(*operands).block_until_ready()


def ours(x: jax.Array, qw: jaxq.QuantizedArray, implementation: str | None, transpose: bool = True):
    return call(lambda x, qw: jaxq.quantized_matmul(x, qw, transpose=transpose, implementation=implementation), x, qw)


def random_weight(rng: np.random.Generator, n: int, k: int, dtype, **spec) -> jaxq.QuantizedArray:
    return jaxq.quantize(jnp.asarray(rng.standard_normal((n, k)), dtype), **spec)


def matmul_cases(args) -> list[dict]:
    """int4 in groups of 64 against the peers, by shape, dtype and rows of x."""
    rng, found = np.random.default_rng(0), []
    for n, k in [SHAPES[i] for i in args.shapes]:
        for dtype in args.dtypes:
            qw = random_weight(rng, n, k, dtype, bits=4, group_size=64)
            rivals = peer_library.Peers(qw, dtype, args.peers)
            for m in args.rows:
                x = jnp.asarray(rng.standard_normal((m, k)), dtype)
                functions = {OURS: ours(x, qw, args.implementation)} | rivals.functions(x)
                seconds = interleave(functions, args.rounds)
                read = qw.nbytes + x.nbytes
                found.append(report(f"{dtype} {n}x{k} M={m}", seconds, read=read, flops=2 * m * n * k))
    return found


def from_memory(x, qw, implementation: str | None) -> Callable[[], object]:
    """`ours`, whose calls go from weight to weight: more copies of one than caches hold, so each comes from memory."""
    weights = [qw] + [jax.tree.map(jnp.copy, qw) for _ in range(COLD_BYTES // qw.nbytes)]
    compiled = jax.jit(lambda x, qw: jaxq.quantized_matmul(x, qw, implementation=implementation)).lower(x, qw).compile()
    turns = itertools.cycle(weights)
    return lambda: compiled(x, next(turns)).block_until_ready()


def format_cases(args) -> list[dict]:
    """One row of x by other formats: the time should be in proportion to the bytes read. The weights are what the last
    call read, and in a second measurement come from memory."""
    rng, found = np.random.default_rng(0), []
    specs = [
        dict(bits=b, group_size=g) for b, g in ((4, 64), (2, 64), (3, 64), (8, 64), (4, 32), (4, 128), (5, 64), (6, 64))
    ]
    specs += [dict(mode=mode) for mode in ("mxfp4", "mxfp8", "nvfp4")]
    n, k = SHAPES[0]
    for dtype in args.dtypes:
        x = jnp.asarray(rng.standard_normal((1, k)), dtype)
        weights = {str(jaxq.QuantSpec(**spec)): random_weight(rng, n, k, dtype, **spec) for spec in specs}
        warm = interleave({name: ours(x, qw, args.implementation) for name, qw in weights.items()}, args.rounds)
        cold = {}
        for name, qw in weights.items():  # one after another: copies of all would not fit
            cold |= interleave({name: from_memory(x, qw, args.implementation)}, args.rounds)
        for where, seconds in (("", warm), (" from memory", cold)):
            base = seconds["int4g64"] / weights["int4g64"].nbytes
            for name, qw in weights.items():
                ratio = seconds[name] / qw.nbytes / base
                took = f"{seconds[name] * 1e6:8.1f} us {qw.nbytes / seconds[name] / 1e9:6.1f} GB/s"
                print(f"{dtype} M=1 {name:8s} {took}  per byte, over int4g64's: {ratio:.2f}{where}")
                case = {"case": f"{dtype} M=1 {name}{where}", "seconds": {OURS: seconds[name]}, "per_byte": ratio}
                found.append(case)
    return found


def backward_cases(args) -> list[dict]:
    """transpose=False over transpose=True."""
    rng, found = np.random.default_rng(0), []
    n, k = SHAPES[0]
    for dtype in args.dtypes:
        qw = random_weight(rng, n, k, dtype, bits=4, group_size=64)
        for m in (1, 8, 128):
            x, g = (jnp.asarray(rng.standard_normal((m, size)), dtype) for size in (k, n))
            functions = {"forward": ours(x, qw, args.implementation), OURS: ours(g, qw, args.implementation, False)}
            found.append(report(f"{dtype} transpose=False M={m}", interleave(functions, args.rounds)))
    return found


def conversion_cases(args) -> list[dict]:
    """quantize and dequantize: bytes read and written per second, over those of a copy."""
    rng, found = np.random.default_rng(0), []
    n, k = SHAPES[0]
    for dtype in args.dtypes:
        w = jnp.asarray(rng.standard_normal((n, k)), dtype)
        qw = jaxq.quantize(w, bits=4, group_size=64)
        functions = {
            "copy": call(lambda w: w.copy(), w),
            "quantize": call(
                lambda w: jaxq.quantize(w, bits=4, group_size=64, implementation=args.implementation).packed, w
            ),
            "dequantize": call(lambda qw: jaxq.dequantize(qw, implementation=args.implementation), qw),
        }
        seconds = interleave(functions, args.rounds)
        copied = 2 * w.nbytes / seconds["copy"]
        for name in ("quantize", "dequantize"):
            share = (w.nbytes + qw.nbytes) / seconds[name] / copied
            print(f"{dtype} {name:10s} {seconds[name] * 1e3:6.2f} ms: {share:.2f} of a copy's {copied / 1e9:.1f} GB/s")
            found.append({"case": f"{dtype} {name}", "seconds": {OURS: seconds[name]}, "of_copy": share})
    return found


def overhead_cases(args) -> list[dict]:
    """A 64x256 weight and one row of x beside a custom call that does nothing, each called again and again inside one
    program, on a row of its own each time."""
    calls = 200
    rng = np.random.default_rng(0)
    qw = random_weight(rng, 64, 256, "float32", bits=4, group_size=64)
    rows = jnp.asarray(rng.standard_normal((calls, 1, 256)), jnp.float32)

    def empty(x, qw):
        return jax.ffi.ffi_call("jaxq_empty_cpu", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)[:, :64]

    def product(x, qw):
        return jaxq.quantized_matmul(x, qw, implementation=args.implementation)

    def repeated(one):
        def program(rows, qw):
            return jax.lax.fori_loop(0, calls, lambda i, y: y + one(rows[i], qw), jnp.zeros((1, 64), rows.dtype))

        return call(program, rows, qw)

    seconds = interleave({"empty call": repeated(empty), OURS: repeated(product)}, 4 * args.rounds)
    seconds = {name: total / calls for name, total in seconds.items()}
    extra, base = seconds[OURS] - seconds["empty call"], seconds["empty call"]
    print(f"overhead: {extra * 1e6:.1f} us over an empty call's {base * 1e6:.1f}")
    return [{"case": "overhead 64x256 M=1", "seconds": seconds}]


def threads_cases(args) -> list[dict]:
    """One CPU's time over two CPUs', for one row by weights from memory and for 512 rows; processes take turns.

    How much faster two threads read memory than one, and multiply floats, bounds it.
    """
    if len(os.sched_getaffinity(0)) < 2:
        print("threads: left out: the process has one CPU")
        return []
    script, found = str(pathlib.Path(__file__).with_name("threads.py")), []
    single, double = machine_limits(1), machine_limits(2)
    for name in double:
        print(f"limits: {name} of two threads over one's: {double[name] / single[name]:.2f}")
    chosen = ["--implementation", args.implementation] if args.implementation else []
    for dtype in args.dtypes:
        times: dict[int, list[dict]] = {1: [], 2: []}
        for cpus in (1, 2) * max(1, args.rounds // 2):
            command = [sys.executable, script, "--cpus", str(cpus), "--dtype", dtype, *chosen]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            times[cpus].append(json.loads(output))
        for m in times[1][0]:
            one, two = (float(np.median([t[m] for t in times[cpus]])) for cpus in (1, 2))
            print(f"{dtype} M={m}: {one * 1e3:.2f} ms on one CPU, {two * 1e3:.2f} on two: {one / two:.2f} of its speed")
            seconds = {OURS: two, "one CPU": one}
            found.append({"case": f"{dtype} M={m} threads", "seconds": seconds, "speedup": one / two})
    return found


def report(case: str, seconds: dict[str, float], read: int = 0, flops: int = 0) -> dict:
    mine = seconds[OURS]
    rates = f" {read / mine / 1e9:5.1f} GB/s {flops / mine / 1e9:6.0f} GFLOP/s" if read else ""
    ratios = "  ".join(f"{name} {s * 1e3:.2f} [{mine / s:.2f}]" for name, s in seconds.items() if name != OURS)
    print(f"{case:28s} {mine * 1e3:8.3f} ms{rates}  {ratios}", flush=True)
    return {
        "case": case,
        "seconds": seconds,
        "bytes_per_s": read / mine,
        "flops_per_s": flops / mine,
        "ratios": {name: mine / s for name, s in seconds.items() if name != OURS},
    }


def plot(results: list[dict], path: pathlib.Path) -> None:
    """The ratios to each peer by case, on a logarithmic axis; below 1 is faster than the peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in results if r.get("ratios")]
    names = sorted({name for row in rows for name in row["ratios"]})
    figure, axes = plt.subplots(figsize=(9, 1 + 0.28 * len(rows)), layout="constrained")
    for name in names:
        points = [(row["ratios"][name], i) for i, row in enumerate(rows) if name in row["ratios"]]
        axes.plot(*zip(*points, strict=True), "o", label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("jaxq's time over the peer's")
    axes.legend()
    figure.savefig(path, dpi=120)


CASES = {
    "matmul": matmul_cases,
    "formats": format_cases,
    "backward": backward_cases,
    "conversion": conversion_cases,
    "overhead": overhead_cases,
    "threads": threads_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--shapes", nargs="+", type=int, default=[0, 1, 2], help=f"indices into {SHAPES}")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    default = [name for name in peer_library.ALL if name not in peer_library.SLOW]
    parser.add_argument("--peers", nargs="*", default=default, help="which peers; none for ours alone")
    parser.add_argument("--implementation", help="for example cpu:avx2")
    parser.add_argument("--cpu-time", action="store_true", help="on a busy machine: minima of CPU time on one CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args()
    if args.cpu_time:
        global clock, summary
        clock, summary = time.process_time, min
    threads = peer_library.THREADS
    limits = machine_limits(threads)
    print("limits:", ", ".join(f"{name} {value / 1e9:.1f}e9" for name, value in limits.items()))
    results = [row for name in args.cases for row in CASES[name](args)]
    for name, reason in peer_library.MISSING.items():
        print(f"left out: {name}: {reason}")
    if args.json:
        args.json.write_text(json.dumps({"threads": threads, "limits": limits, "results": results}, indent=1))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
