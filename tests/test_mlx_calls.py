"""`mlx`, beyond what every implementation is tested for: poison, one thread, no hanging, what it refuses."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import subprocess
import sys
import textwrap
import tomllib

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq.lowerings import mlx

mx = pytest.importorskip("mlx.core", reason=f"{mlx.unavailable()}")

SPECS = [spec for spec in cases.SPECS if mlx.refuses("quantize", spec=spec) is None]
REFUSED = [spec for spec in cases.SPECS if spec not in SPECS]


def test_the_extra_asks_for_the_release_that_is_checked_for():
    project = tomllib.loads((pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    oldest = ".".join(map(str, mlx._OLDEST))
    assert all(f">={oldest};" in wanted for wanted in project["optional-dependencies"]["mlx"])


@pytest.mark.parametrize("x_dtype", cases.DTYPES)
@pytest.mark.parametrize("scale_dtype", cases.DTYPES)
def test_x_and_scales_of_different_dtypes(x_dtype, scale_dtype):
    weight = cases.weight(jaxq.QuantSpec(4, 64), (24, 128), scale_dtype)
    x = cases.activations((3, 128), x_dtype)
    y = jaxq.quantized_matmul(x, weight.qw, implementation="mlx")
    error = np.abs(np.asarray(y, np.float64) - oracle.matmul(np.asarray(x), weight.dense, transpose=True))
    assert y.dtype == x.dtype
    assert np.all(error <= cases.matmul_bound(x, weight.qw, weight.dense, transpose=True))


@pytest.mark.parametrize("spec", [s for s in cases.FEW_SPECS if s in SPECS], ids=str)
def test_a_poisoned_group_makes_its_products_nan_and_no_others(spec):
    w = np.array(cases.activations((4, 256)))
    w[2, spec.group_size + 1] = np.inf
    qw = jaxq.quantize(w, bits=spec.bits, group_size=spec.group_size, mode=spec.mode, implementation="mlx")
    bad = np.zeros((4, 256), bool)
    bad[2, spec.group_size : 2 * spec.group_size] = True
    # Even where x is 0.
    for x, transpose in ((jnp.zeros((3, 256)), True), (jnp.ones((3, 256)), True), (jnp.zeros((3, 4)), False)):
        y = jaxq.quantized_matmul(x, qw, transpose=transpose, implementation="mlx")
        np.testing.assert_array_equal(np.isnan(y), np.broadcast_to(bad.any(-1 if transpose else 0), y.shape))


@pytest.mark.parametrize("mode, scale", [("mxfp4", 0xFF), ("mxfp8", 0xFF), ("nvfp4", 0x7F), ("nvfp4", 0xFF)])
def test_scales_that_are_nan_make_their_group_nan(mode, scale):
    qw = cases.weight(jaxq.QuantSpec(mode=mode), (4, 64)).qw
    qw = jaxq.QuantizedArray(qw.packed, qw.scales.at[1, 1].set(scale), spec=qw.spec)
    expected = np.zeros((4, 64), bool)
    expected[1, qw.group_size : 2 * qw.group_size] = True
    np.testing.assert_array_equal(np.isnan(qw.dequantize(implementation="mlx")), expected)


@pytest.mark.parametrize("shape, transpose", [((0, 64), True), ((2, 0, 64), True), ((0, 8), False)])
def test_products_with_no_rows(shape, transpose):
    qw = cases.weight(jaxq.QuantSpec(4, 64), (8, 64)).qw
    y = jaxq.quantized_matmul(jnp.zeros(shape), qw, transpose=transpose, implementation="mlx")
    assert y.shape == (*shape[:-1], 8 if transpose else 64)


def test_weights_with_no_rows():
    qw = jaxq.quantize(jnp.zeros((0, 64)), implementation="mlx")
    assert qw.shape == (0, 64)
    assert qw.dequantize(implementation="mlx").shape == (0, 64)
    assert jaxq.quantized_matmul(jnp.ones((3, 64)), qw, implementation="mlx").shape == (3, 0)
    np.testing.assert_array_equal(
        jaxq.quantized_matmul(jnp.ones((3, 0)), qw, transpose=False, implementation="mlx"), np.zeros((3, 64))
    )


# ---- transformations


def product(x, qw, **options):
    return jaxq.quantized_matmul(x, qw, implementation="mlx", **options)


def test_scan_of_a_thousand_iterations():
    # A permutation with exact codes, so that every step is exact: y[n] = x[n - 1].
    codes = np.eye(64, dtype=np.int64)[np.roll(np.arange(64), 1)]
    one = jnp.ones((64, 1))
    qw = jaxq.QuantizedArray.from_packed(jnp.asarray(oracle.pack(codes, 4)), one, 0 * one, bits=4, group_size=64)
    x = np.arange(64, dtype=np.float32)
    last, first = jax.jit(lambda x: jax.lax.scan(lambda c, _: (product(c, qw), c[0]), x, length=1000))(x)
    np.testing.assert_array_equal(last, np.roll(x, 1000))
    np.testing.assert_array_equal(first, -np.arange(1000) % 64)


def test_derivatives_run_in_mlx_too():
    qw = cases.weight(jaxq.QuantSpec(4, 64), (24, 128)).qw
    x = cases.activations((3, 128))
    text = jax.jit(jax.grad(lambda x: product(x, qw).sum())).lower(x).as_text()
    assert "dot_general" not in text
    gradient = jax.grad(lambda x: (product(x, qw) ** 2).sum())(x)
    expected = jax.grad(lambda x: ((x @ qw.dequantize(implementation="xla").T) ** 2).sum())(x)
    # Both are two float32 products of at most 128 terms; 2**-24 * (128 + 24 + 4) of the sums of magnitudes.
    w = np.abs(cases.dense(qw))
    scale = 2 * np.abs(np.asarray(x, np.float64)) @ w.T @ w
    assert np.all(np.abs(np.asarray(gradient - expected)) <= 2 * 156 * 2.0**-24 * scale)


# ---- threads


def test_eight_threads_at_once_get_the_same_bits():
    qw = cases.weight(jaxq.QuantSpec(4, 64), (64, 256)).qw
    xs = [cases.activations((4, 256), seed=seed) for seed in range(8)]
    f = jax.jit(product)
    expected = [np.asarray(f(x, qw)) for x in xs]

    def work(i: int) -> int:
        return sum(not np.array_equal(f(xs[i], qw), expected[i]) for _ in range(100))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 0


def test_async_dispatch():
    qw = cases.weight(jaxq.QuantSpec(4, 64), (256, 256)).qw
    x = cases.activations((64, 256))
    f = jax.jit(product)
    results = [f(x, qw) for _ in range(50)]
    for y in results:
        np.testing.assert_array_equal(y, results[0])


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_callers_on_new_threads_leave_no_threads_behind():
    # MLX itself would keep one stream thread for each.
    qw = cases.weight(jaxq.QuantSpec(4, 64), (64, 64)).qw
    x = cases.activations((1, 64))
    f = jax.jit(product)
    np.asarray(f(x, qw))

    def on_new_threads() -> int:
        for _ in range(50):
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                pool.submit(lambda: np.asarray(f(x, qw))).result()
        return len(os.listdir("/proc/self/task"))

    before = on_new_threads()
    # XLA may start a few of its own; half of the callers would be a leak.
    assert on_new_threads() < before + 25


def test_results_are_views_of_mlx_memory():
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        array = mx.zeros((4, 8), dtype)
        mx.eval(array)
        name = str(dtype).rpartition(".")[2]
        first, second = (mlx._to_numpy(array, np.dtype(jnp.dtype(name))) for _ in range(2))
        assert np.shares_memory(first, second) and first.dtype.name == name


def test_an_error_in_the_callback_reaches_the_caller_and_the_worker_lives_on(monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("broken on purpose")

    qw = cases.weight(jaxq.QuantSpec(4, 64), (16, 64)).qw
    x = cases.activations((7, 64))
    monkeypatch.setitem(mlx._RUN, "quantized_matmul", fail)
    broken = jax.jit(lambda x: product(x, qw))
    with pytest.raises(Exception, match="broken on purpose"):
        jax.block_until_ready(broken(x))
    monkeypatch.undo()
    assert jax.jit(lambda x: product(x, qw) + 0)(x).shape == (7, 16)


# ---- processes. A watchdog kills what hangs; then the test fails with the stacks of all threads.


def run(script: str, seconds: int = 60, **environment: str) -> str:
    script = f"import faulthandler; faulthandler.dump_traceback_later({seconds - 5}, exit=True)\n" + textwrap.dedent(
        script
    )
    root = pathlib.Path(jaxq.__file__).parent.parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env | environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("devices", [1, 8])
def test_does_not_hang_with_threads_and_large_operands(devices):
    # With jax.pure_callback in the place of ours, this hangs on jax 0.10.2 with one device: its callback waits for JAX
    # to copy large operands, on threads that are all waiting in callbacks.
    out = run(
        """
        import concurrent.futures, jax, jax.numpy as jnp, jaxq
        from jax.sharding import AxisType, PartitionSpec as P

        qw = jaxq.quantize(jnp.ones((1024, 4096)), bits=8, implementation="mlx")
        product = lambda x, qw: jaxq.quantized_matmul(x, qw, implementation="mlx")
        if jax.device_count() > 1:
            mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
            product = jax.shard_map(product, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i"))
        f, x = jax.jit(product), jnp.ones((8, 4096))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            sums = pool.map(lambda i: [float(f(x + 0, qw).sum()) for _ in range(4)], range(8))
        print({y for ys in sums for y in ys})
        """,
        seconds=100,
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
    )
    assert out.strip() == f"{{{8 * 1024 * 4096:.1f}}}"


def test_a_process_may_end_with_calls_in_flight():
    run(
        """
        import jax, jax.numpy as jnp, jaxq
        qw = jaxq.quantize(jnp.ones((1024, 1024)), implementation="mlx")
        f = jax.jit(lambda x: jaxq.quantized_matmul(x, qw, implementation="mlx"))
        x = jnp.ones((256, 1024))
        results = [f(x) for _ in range(3)]
        """
    )


def test_importing_jaxq_does_not_import_mlx():
    assert run("import sys, jaxq; print('mlx' in sys.modules, 'mlx.core' in sys.modules)").split() == ["False", "False"]


# ---- what it refuses


@pytest.mark.parametrize("spec", REFUSED, ids=str)
def test_formats_that_mlx_lacks_are_refused_by_name(spec):
    assert spec.is_affine and spec.group_size == 16
    with pytest.raises(
        ValueError, match=r"quantize: implementation='mlx' can't be used here: MLX has affine groups of"
    ):
        jaxq.quantize(jnp.ones((4, 128)), bits=spec.bits, group_size=spec.group_size, implementation="mlx")
    with pytest.raises(ValueError, match=r"\[quantize\] The requested group size 16 is not supported"):
        mx.quantize(mx.ones((4, 128)), bits=spec.bits, group_size=spec.group_size)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs several CPU devices")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_several_devices_only_in_shard_map(axis_type):
    mesh = jax.make_mesh((jax.device_count(),), ("i",), axis_types=(axis_type,))
    qw = cases.weight(jaxq.QuantSpec(4, 64), (24, 128)).qw
    x = jax.device_put(cases.activations((16, 128)), NamedSharding(mesh, P("i")))
    replicated = jax.device_put(qw, NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match=r"quantized_matmul: implementation='mlx'.*devices.*jax\.shard_map"):
        jax.jit(product)(x, replicated)
    mapped = jax.jit(jax.shard_map(product, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i")))
    np.testing.assert_array_equal(mapped(x, replicated), product(np.asarray(x), qw))


def test_other_platforms_and_export_are_refused():
    qw = cases.weight(jaxq.QuantSpec(4, 64), (24, 128)).qw
    x = cases.activations((2, 128))
    f = jax.jit(product)
    with pytest.raises(ValueError, match="implementation='mlx' serves cpu, and this is lowered for tpu"):
        f.trace(x, qw).lower(lowering_platforms=("tpu",))
    with pytest.raises(ValueError, match="serves cpu, and this is lowered for several platforms"):
        f.trace(x, qw).lower(lowering_platforms=("cpu", "tpu"))
    with pytest.raises(ValueError, match="an exported program can't call back to Python"):
        jax.export.export(f)(x, qw)


def test_absence_is_explained(monkeypatch):
    mlx.unavailable.cache_clear()
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    try:
        assert "install the extra" in jaxq.implementations()["cpu"]["mlx"]
        with pytest.raises(ValueError, match=r"can't be used here: mlx can't be imported .*jaxq\[mlx\]"):
            jaxq.quantize(jnp.ones((4, 64)), implementation="mlx")
        monkeypatch.undo()
        mlx.unavailable.cache_clear()
        monkeypatch.setattr(mx, "__version__", "0.30.1")
        assert mlx.unavailable() == "mlx 0.30.1 is too old; 0.32.4 or newer is needed"
    finally:
        monkeypatch.undo()
        mlx.unavailable.cache_clear()
    assert mlx.unavailable() is None
