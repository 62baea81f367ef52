"""How fast checkpoints load, and how much memory that takes: `python benchmarks/checkpoints.py --format all`.

Writes a checkpoint of random words, of layers as in a model of 7 billion weights (4096 x 11008 and 4096 x 4096), to a
directory that it removes, reads it once so that the system caches it, and then times, interleaved:

  read        the files, by read(2), into fresh memory: what the system's cache gives
  read+copy   the files, by read(2), into a small buffer that is used again, and as many bytes as jaxq's arrays have
              copied from it to fresh memory: what a reader must do whose arrays are not the file's bytes; one thread
  jaxq        jaxq.checkpoints.load
  safetensors safetensors.numpy.load_file, where the format is one of its files
  mlx         mlx.core.load and its evaluation, for MLX's format and those GGUF types that it reads

First says whether the compiled library that repacks is missing, of an older version, or older than its sources: loads
of all formats but MLX's are several times slower without it.

Prints medians, their ratios to `read` and to `read+copy`, the best, the time of processors (which other programs
disturb less), and for jaxq the peak of the resident memory beyond that before the load, as a multiple of the arrays'
bytes; each from a process of its own, which has used and freed as much memory just before. A run during which other
programs took more than a tenth of a CPU is done again, at most three times as many in all; then it counts, and the
result says how many such there are.

    python benchmarks/checkpoints.py --format mlx gptq awq gguf:Q4_0 gguf:Q4_K gguf:Q6_K --gigabytes 4 --repeats 3

takes 4.7 GB of the disk, and 13 GB of memory: the cached file, and a quarter more than the arrays.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jaxq import QuantizedArray, QuantSpec, checkpoints, kernels
from jaxq.checkpoints import safetensors
from jaxq.checkpoints.entries import Checkpoint, Entry, dense
from jaxq.checkpoints.gguf_blocks import BLOCKS
from jaxq.kernels import repack

SHAPES = [(11008, 4096), (4096, 11008), (4096, 4096), (4096, 4096)]
GROUP = 64
FORMATS = ["mlx", "gptq", "awq", *(f"gguf:{name}" for name in BLOCKS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=0.5, help="size of each checkpoint (default 0.5)")
    parser.add_argument("--format", choices=[*FORMATS, "all"], nargs="+", default=["mlx"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write it (default: the system's temporary directory)")
    parser.add_argument("--ways", nargs="*", help="only these of read, read+copy, jaxq, safetensors and mlx")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # the child process that is measured
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load_once(arguments.load)))
        return
    warning = library_warning()
    if warning:
        print(f"WARNING: {warning}", file=sys.stderr, flush=True)
    results = []
    for format in FORMATS if "all" in arguments.format else arguments.format:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            path = write(Path(directory) / "model", format, int(arguments.gigabytes * 1e9))
            results.append(measure(path, format, arguments.repeats, arguments.ways))
        if not arguments.json:
            show(results[-1], arguments.repeats)
    if arguments.json:
        print(json.dumps({"warning": warning, "results": results}))


def library_warning() -> str | None:
    """What is wrong with the library that repacks; None where it is there and as new as its sources."""
    if why := repack.why_unavailable():
        return f"NumPy repacks, several times slower: {why}"
    directory = Path(repack.__file__).parent / "cpu"
    library = Path(kernels.cpu_library()._name)
    newer = [p.name for p in directory.glob("*") if p.suffix in (".cc", ".h") and p.stat().st_mtime > mtime(library)]
    if newer:
        some = ", ".join(sorted(newer)[:3])
        return f"{library.name} is older than {len(newer)} of its sources ({some}); python -m jaxq.kernels.cpu.build"
    return None


def mtime(path: Path) -> float:
    return path.stat().st_mtime


def show(result: dict, repeats: int) -> None:
    seconds = result["seconds"]
    disturbed = f"; {result['disturbed']} beside other programs" if result["disturbed"] else ""
    print(f"{result['format']}, {result['file_bytes'] / 1e9:.2f} GB, median of {repeats}{disturbed}")
    for name, median in seconds.items():
        rate = result["file_bytes"] / median / 1e9
        ratios = "".join(f"  {median / seconds[way]:5.2f} x {way}" for way in ("read", "read+copy") if way in seconds)
        best, cpu = result["best_seconds"][name], result["cpu_seconds"][name]
        print(f"  {name:12} {median:7.3f} s  {rate:6.2f} GB/s{ratios}  best {best:7.3f} s  {cpu:7.3f} s of CPU")
    if "jaxq" in seconds:
        print(f"  jaxq's arrays: {result['array_bytes'] / result['file_bytes']:.2f} x the file")
        print(f"  jaxq's peak memory: {result['peak']:.3f} x the arrays", flush=True)


def measure(path: Path, format: str, repeats: int, only: list[str] | None) -> dict:
    """Medians of interleaved runs, each in a fresh process so that none finds another's memory."""
    ways = ["read", "read+copy", "jaxq"]
    if not format.startswith("gguf"):
        ways.append("safetensors")
    if format in ("mlx", "gguf:Q4_0", "gguf:Q4_1", "gguf:Q8_0"):
        ways.append("mlx")
    ways = [way for way in ways if not only or way in only]
    times: dict[str, list[float]] = {way: [] for way in ways}
    cpu_times: dict[str, list[float]] = {way: [] for way in ways}
    peaks, again, disturbed = [0.0], 2 * repeats * len(ways), 0
    for _ in range(repeats):
        for way in ways:
            while (measured := child(path, way))["others_cpus"] > 0.1 and again:
                again -= 1
            disturbed += measured["others_cpus"] > 0.1
            times[way].append(measured["seconds"])
            cpu_times[way].append(measured["cpu_seconds"])
            if way == "jaxq":
                peaks.append(measured["peak"])
    return {
        "format": format,
        "file_bytes": sum(file.stat().st_size for file in files_of(path)),
        "array_bytes": array_bytes(path),
        "seconds": {way: statistics.median(values) for way, values in times.items()},
        "best_seconds": {way: min(values) for way, values in times.items()},
        "cpu_seconds": {way: statistics.median(values) for way, values in cpu_times.items()},
        "peak": max(peaks),
        "disturbed": disturbed,
    }


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def array_bytes(path: Path) -> int:
    return sum(entry.nbytes for entry in checkpoints.open(path).entries.values())


def child(path: Path, way: str) -> dict:
    command = [sys.executable, __file__, "--load", f"{way}={path}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def load_once(argument: Path) -> dict:
    """Seconds, and the peak of the resident memory over the arrays' bytes."""
    import jax

    way, path = str(argument).split("=", 1)
    files, nbytes = files_of(Path(path)), array_bytes(Path(path))
    jax.block_until_ready(jax.device_put(np.zeros(1)))
    ways: dict[str, Callable[[], object]] = {
        "read": lambda: [read(file) for file in files],
        "read+copy": lambda: read_and_copy(files, nbytes),
        "jaxq": lambda: jax.block_until_ready(checkpoints.load(path)),
        "safetensors": lambda: by_safetensors(files),
        "mlx": lambda: by_mlx(files),
    }
    touch(max(nbytes, sum(file.stat().st_size for file in files)) * 5 // 4)
    before = memory("VmRSS")
    all_start, start, cpu_start = busy_seconds(), time.perf_counter(), time.process_time()
    loaded = ways[way]()
    seconds, cpu_seconds, busy = (
        time.perf_counter() - start,
        time.process_time() - cpu_start,
        busy_seconds() - all_start,
    )
    peak = (memory("VmHWM") - before) / nbytes
    del loaded
    # Linux counts in hundredths of a second; two of them per CPU are less than can be told from none.
    others = max(busy - cpu_seconds - 0.02 * (os.cpu_count() or 1), 0) / seconds
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak": peak, "others_cpus": others}


def busy_seconds() -> float:
    """What all CPUs together have spent so far on anything, from Linux's account; 0 elsewhere."""
    account = Path("/proc/stat")
    if not account.exists():
        return 0.0
    user, nice, system, _, _, irq, soft, steal, *_ = map(int, account.read_text().split(None, 11)[1:-1])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def touch(nbytes: int) -> None:
    """Use so much memory, free it, and forget that peak.

    A virtual machine's host takes back what has been free for two seconds and is slow to give it again, which would be
    counted for whoever comes first, or needs more.
    """
    np.ones(nbytes, np.uint8)
    if (peak := Path("/proc/self/clear_refs")).exists():
        peak.write_text("5")  # sets VmHWM to VmRSS; see proc(5)


def read(file: Path) -> np.ndarray:
    with open(file, "rb", buffering=0) as source:
        out = np.empty(file.stat().st_size, np.uint8)
        done = 0
        while done < out.size:
            done += source.readinto(out[done : done + (1 << 30)].data)
    return out


def read_and_copy(files: list[Path], nbytes: int) -> np.ndarray:
    """The copies are spread evenly over the reads. One array of `nbytes`, in huge pages, as `read`'s."""
    total, done, copied = sum(file.stat().st_size for file in files), 0, 0
    buffer, out = np.empty(1 << 20, np.uint8), np.empty(nbytes, np.uint8)
    for file in files:
        with open(file, "rb", buffering=0) as source:
            while got := source.readinto(buffer.data):
                done += got
                while copied < (until := nbytes * done // total):
                    some = min(until - copied, len(buffer))
                    out[copied : copied + some] = buffer[:some]
                    copied += some
    return out


def by_safetensors(files: list[Path]) -> object:
    from safetensors.numpy import load_file

    return [load_file(file) for file in files]


def by_mlx(files: list[Path]) -> object:
    import mlx.core as mx

    loaded = [mx.load(str(file)) for file in files]
    mx.eval(loaded)
    return loaded


def memory(field: str) -> int:
    """Bytes, from Linux's account of this process; 0 elsewhere."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


# ---- writing


def write(path: Path, format: str, nbytes: int) -> Path:
    """A checkpoint of about `nbytes` of random words; the same few megabytes over and over."""
    noise = np.random.default_rng(0).integers(0, 2**32, (1 << 20) + 7, np.uint32).view(np.uint8)
    if format.startswith("gguf"):
        return write_gguf(path.with_suffix(".gguf"), format.removeprefix("gguf:"), nbytes, noise)
    if format == "mlx":
        checkpoints.mlx.save(path, random_checkpoint(nbytes, noise), {"model_type": "none"})
        return path
    config = {"quant_method": format, "bits": 4, "group_size": 128, "sym": True, "version": "gemm"}
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"quantization_config": config}))
    layout = {}
    for i, (n, k) in layers(nbytes, lambda n, k: n * k // 2):
        rows = (k // 8, n) if format == "gptq" else (k, n // 8)
        layout[f"{i}.qweight"] = dense(rows, np.int32)
        layout[f"{i}.qzeros"] = dense((k // 128, n // 8), np.int32)
        layout[f"{i}.scales"] = dense((k // 128, n), np.float16)
    zeros = {"qzeros": np.uint32(0x77777777 if format == "gptq" else 0x88888888)}
    stream = ((name, filled(struct, noise, zeros.get(name.split(".")[1]))) for name, struct in layout.items())
    safetensors.write(path / "model.safetensors", layout, stream)
    return path


def layers(nbytes: int, size: Callable[[int, int], int]) -> Iterator[tuple[int, tuple[int, int]]]:
    i = 0
    while nbytes > 0:
        shape = SHAPES[i % len(SHAPES)]
        yield i, shape
        nbytes -= size(*shape)
        i += 1


def filled(struct, noise: np.ndarray, value=None) -> np.ndarray:
    """An array of noise; of ones where it is of floats, and of `value` where that is given."""
    if struct.dtype.kind == "f" or struct.dtype.name == "bfloat16":
        return np.ones(struct.shape, struct.dtype)
    if value is not None:
        return np.full(struct.shape, value.view(struct.dtype))
    nbytes = struct.size * struct.dtype.itemsize
    return np.resize(noise, nbytes).view(struct.dtype).reshape(struct.shape)


def random_checkpoint(nbytes: int, noise: np.ndarray) -> Checkpoint:
    import ml_dtypes

    spec, entries = QuantSpec(4, GROUP), {}
    for i, (n, k) in layers(nbytes, lambda n, k: n * k // 2):
        scales = dense((n, k // GROUP), ml_dtypes.bfloat16)
        abstract = QuantizedArray(dense((n, k // 8), np.uint32), scales, scales, spec=spec)
        make = lambda abstract=abstract: [filled(leaf, noise) for leaf in abstract.leaves]  # noqa: E731
        entries[f"layers.{i}.weight"] = Entry(abstract, "random", 0, make)
    return Checkpoint(Path("random"), "mlx", {}, entries)


def write_gguf(path: Path, name: str, nbytes: int, noise: np.ndarray) -> Path:
    import gguf

    kind = BLOCKS[name]
    writer = gguf.GGUFWriter(path, "none")
    for i, (n, k) in layers(nbytes, lambda n, k: n * k // kind.block * kind.nbytes):
        row = np.resize(noise, 64 * k // kind.block * kind.nbytes).reshape(-1, kind.nbytes)
        row[:, -2:] = row[:, :2] = np.array([1], np.float16).view(np.uint8)  # where some type has its fp16
        rows = np.broadcast_to(row.reshape(1, 64, -1), (n // 64, 64, k // kind.block * kind.nbytes))
        writer.add_tensor(
            f"{i}.weight", np.ascontiguousarray(rows).reshape(n, -1), raw_dtype=gguf.GGMLQuantizationType[name]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


if __name__ == "__main__":
    main()
