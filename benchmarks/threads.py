"""Times of quantized products on some of this machine's CPUs, for cpu.py's case `threads`; prints JSON.

    python benchmarks/threads.py --cpus 1 --dtype float32 --rows 1 512

XLA starts as many threads as the process may use CPUs, once, so every number of CPUs needs a process of its own. One
row of x goes from weight to weight, more of them than caches hold, so that each comes from memory; more rows stay with
one weight.
"""

import argparse
import json
import os
import time

SHAPE = (4096, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpus", type=int, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 512])
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each number of rows is repeated")
    parser.add_argument("--implementation")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cpus])  # before any library counts the CPUs
    print(json.dumps({str(m): measure(m, args.dtype, args.seconds, args.implementation) for m in args.rows}))


def measure(m: int, dtype: str, seconds: float, implementation: str | None) -> float:
    """The median seconds of x[m, K] by an int4 weight[N, K] in groups of 64."""
    # Here, since these count the CPUs when they are imported.
    import jax.numpy as jnp
    import numpy as np
    from cpu import from_memory, ours, random_weight

    rng = np.random.default_rng(0)
    qw = random_weight(rng, *SHAPE, dtype, bits=4, group_size=64)
    x = jnp.asarray(rng.standard_normal((m, SHAPE[1])), dtype)
    product = (from_memory if m == 1 else ours)(x, qw, implementation)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < end:
        before = time.perf_counter()
        product()
        times.append(time.perf_counter() - before)
    return float(np.median(times[1:]))


if __name__ == "__main__":
    main()
