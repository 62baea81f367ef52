"""What the jax-metal plugin would be given, checked on the jaxlib that it was made for, by its CPU compiler.

The plugin (0.1.1) takes StableHLO 1.7.5 and loads into jax up to 0.5.0. `make metal` runs the two halves of this file:

    python tools/metal.py write DIRECTORY   # with jaxq: lower every operation and format for METAL, serialize
    python tools/metal.py run DIRECTORY     # with jax 0.4.34 and no jaxq: compile, run, compare with the oracle

Locations are left out of what is serialized: StableHLO 1.7.5 doesn't know those of today.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np

VERSION = "1.7.5"
ROWS, LENGTH, BATCH = 24, 256, 3


# ---- write


def write(directory: pathlib.Path) -> None:
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
    import cases

    directory.mkdir(parents=True, exist_ok=True)
    manifest = []
    for spec in cases.SPECS:
        programs = [quantize_program(spec), dequantize_program(spec, "float32")]
        programs += [matmul_program(spec, dtype, transpose=True) for dtype in cases.DTYPES]
        programs += [matmul_program(spec, "float32", transpose=False)]
        for op, f, args, expected, bounds in programs:
            name = f"{len(manifest):03}"
            (directory / f"{name}.mlir").write_bytes(serialize(f, args))
            arrays = {f"in{i}": bits(np.asarray(a)) for i, a in enumerate(args)}
            arrays |= {f"out{i}": np.asarray(a, np.float64) for i, a in enumerate(expected)}
            arrays |= {f"bound{i}": np.asarray(a, np.float64) for i, a in enumerate(bounds)}
            np.savez(directory / f"{name}.npz", **arrays)
            manifest.append({"name": name, "what": f"{op} {spec}", "dtypes": [np.asarray(a).dtype.name for a in args]})
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1))
    print(f"{len(manifest)} programs for METAL as StableHLO {VERSION} in {directory}")


def serialize(f, args) -> bytes:
    import jax
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import stablehlo
    from jax.interpreters import mlir

    text = jax.jit(f).trace(*args).lower(lowering_platforms=("METAL",)).as_text()
    with mlir.make_ir_context() as context:
        return stablehlo.serialize_portable_artifact(ir.Module.parse(text, context=context), VERSION)


def bits(a: np.ndarray) -> np.ndarray:
    """bfloat16, which NumPy's files don't know, as uint16."""
    return a.view(np.uint16) if a.dtype.name == "bfloat16" else a


def quantize_program(spec):
    """Bit for bit as mlx.core.quantize, or, for the format that it lacks, as on today's jaxlib."""
    import jaxq

    def quantize(w):
        return jaxq.quantize(w, bits=spec.bits, group_size=spec.group_size, mode=spec.mode, implementation="xla").leaves

    w = np.random.default_rng(0).standard_normal((ROWS, LENGTH)).astype(np.float32)
    if spec.is_affine and spec.group_size == 16:
        expected = quantize(w)
    else:
        import mlx.core as mx

        with mx.stream(mx.cpu):
            expected = mx.quantize(mx.array(w), group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
    expected = [np.array(a) for a in expected]
    return "quantize", quantize, [w], expected, [np.zeros(a.shape) for a in expected]


def dequantize_program(spec, dtype):
    import cases

    import jaxq

    weight = cases.weight(spec, (ROWS, LENGTH), dtype)

    def dequantize(*leaves):
        return [jaxq.dequantize(jaxq.QuantizedArray(*leaves, spec=spec), dtype, implementation="xla")]

    bound = cases.dequantize_bound(weight.qw, weight.dense, dtype)
    return f"dequantize {dtype}", dequantize, weight.qw.leaves, [weight.dense], [bound]


def matmul_program(spec, dtype, *, transpose):
    import cases
    import oracle

    import jaxq

    weight = cases.weight(spec, (ROWS, LENGTH), dtype)
    x = cases.activations((BATCH, LENGTH if transpose else ROWS), dtype)

    def product(x, *leaves):
        qw = jaxq.QuantizedArray(*leaves, spec=spec)
        return [jaxq.quantized_matmul(x, qw, transpose=transpose, implementation="xla")]

    y = oracle.matmul(np.asarray(x), weight.dense, transpose=transpose)
    bound = cases.matmul_bound(x, weight.qw, weight.dense, transpose=transpose)
    what = f"quantized_matmul {dtype}{'' if transpose else ', not transposed'}"
    return what, product, [x, *weight.qw.leaves], [y], [bound]


# ---- run. On an old jax, without jaxq.


def run(directory: pathlib.Path) -> int:
    import jax
    import jaxlib.version
    import ml_dtypes
    from jaxlib import xla_client
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    client = jax.devices("cpu")[0].client
    manifest = json.loads((directory / "manifest.json").read_text())
    failures, worst = 0, 0.0
    for entry in manifest:
        with ir.Context() as context:
            stablehlo.register_dialect(context)
            module = stablehlo.deserialize_portable_artifact(
                context, (directory / f"{entry['name']}.mlir").read_bytes()
            )
            program = client.compile(str(module), xla_client.CompileOptions())
        with np.load(directory / f"{entry['name']}.npz") as arrays:
            data = dict(arrays)
        args = [data[f"in{i}"] for i in range(len(entry["dtypes"]))]
        args = [
            a.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else a
            for a, dtype in zip(args, entry["dtypes"], strict=True)
        ]
        buffers = [client.buffer_from_pyval(a) for a in args]
        results = [np.asarray(y).astype(np.float64) for y in program.execute(buffers)]
        for i, y in enumerate(results):
            error, bound = np.abs(y - data[f"out{i}"]), data[f"bound{i}"]
            if not (y.shape == bound.shape and np.all(error <= bound)):
                failures += 1
                print(
                    f"{entry['what']}: result {i} is off by {np.nanmax(error):.3g}, {np.sum(~(error <= bound))} values"
                )
            elif np.any(bound):
                worst = max(worst, float(np.max(error / bound)))
    print(
        f"jaxlib {jaxlib.version.__version__}: {len(manifest)} programs, {failures} results out of bounds; "
        f"the largest error is {worst:.2f} of its bound"
    )
    return 1 if failures or not manifest else 0


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("write", "run"):
        sys.exit(__doc__)
    target = pathlib.Path(sys.argv[2])
    sys.exit(write(target) if sys.argv[1] == "write" else run(target))
