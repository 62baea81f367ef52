"""`quantize` against `mlx.core.quantize`, bit for bit, and the rules for what MLX leaves open."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, FLOAT, IMPLEMENTATIONS, SPECS, dense, refused

import jaxq

mx = pytest.importorskip("mlx.core") if jax.default_backend() == "cpu" else None

ROWS, LENGTH = 24, 256
LARGEST = {"float32": 3.0e38, "bfloat16": 3.0e38, "float16": 6.0e4}


def weights(dtype: str) -> dict[str, np.ndarray]:
    """Weights whose groups try every branch of the rule. All are normal numbers, and so are all float-mode scales:
    XLA flushes subnormal float32 to zero, where MLX keeps it."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal((ROWS, LENGTH))
    edges = rng.uniform(1, 2, (ROWS, 1)).astype(np.float32)
    top = 2.0 ** rng.choice([2, 3, 4, 5, 6, 8], (ROWS, 1)) - 1
    halves = edges * (1 - (rng.integers(0, top // 2, (ROWS, LENGTH)) + 0.5) / top)
    halves = (halves.astype(np.float32).view(np.int32) + rng.integers(-2, 3, halves.shape, np.int32)).view(np.float32)
    halves[:, ::16], halves[:, 1::16] = 0, edges
    wide = (-100, 100) if dtype != "float16" else (-12, 10)
    cases = {
        "random": normal,
        "constant": np.full((ROWS, LENGTH), 0.37),
        "zero": np.zeros((ROWS, LENGTH)),
        "positive": np.abs(normal),
        "negative": -np.abs(normal) - 3,
        "tiny": normal * (1e-9 if dtype != "float16" else 1e-6),
        "huge": np.clip(normal * LARGEST[dtype] / 3, -LARGEST[dtype], LARGEST[dtype]),
        "integers": rng.integers(-8, 8, (ROWS, LENGTH)),
        "rows of every scale": normal * np.exp2(rng.uniform(*wide, (ROWS, 1))),
        "groups of every scale": normal * np.exp2(rng.uniform(*wide, (ROWS, LENGTH))),
        "units in the last place about halves between codes": halves,
        "one in a group": np.where(np.arange(LENGTH) % 64 == 5, normal, 0),
    }
    return {name: np.asarray(jnp.asarray(w, jnp.float32).astype(dtype)) for name, w in cases.items()}


def bits(array) -> np.ndarray:
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}.get(array.dtype.itemsize, array.dtype))


def mlx_quantize(w: np.ndarray, spec: jaxq.QuantSpec) -> list[np.ndarray]:
    array = mx.array(w.astype(np.float32)).astype(getattr(mx, w.dtype.name))
    outs = mx.quantize(array, group_size=spec.group_size, bits=spec.bits, mode=spec.mode, stream=mx.cpu)
    return [np.array(o.view(mx.uint16)) if o.dtype.size == 2 else bits(np.array(o)) for o in outs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [s for s in SPECS if s.group_size != 16 or not s.is_affine], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_mlx(implementation, spec, dtype):
    if reason := refused(implementation, "quantize", spec):
        with pytest.raises(ValueError, match="implementation"):
            jaxq.quantize(jnp.ones((2, 128)), bits=spec.bits, group_size=spec.group_size, implementation=implementation)
        assert reason
        return
    for name, w in weights(dtype).items():
        qw = jaxq.quantize(w, bits=spec.bits, group_size=spec.group_size, mode=spec.mode, implementation=implementation)
        for leaf, expected in zip(qw.leaves, mlx_quantize(w, spec), strict=True):
            np.testing.assert_array_equal(bits(leaf), expected, err_msg=name)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_eager_jit_and_vmap_agree(spec):
    w = jnp.asarray(np.random.default_rng(3).standard_normal((4, 6, 256)).astype(np.float32))

    def quantize(w):
        return jaxq.quantize(w, bits=spec.bits, group_size=spec.group_size, mode=spec.mode)

    eager = quantize(w)
    for other in (jax.jit(quantize)(w), jax.vmap(quantize)(w), jax.jit(jax.vmap(quantize))(w)):
        assert other.shape == eager.shape
        jax.tree.map(np.testing.assert_array_equal, eager, other)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_error_is_at_most_half_a_step(spec, implementation):
    """A weight is off by half a step, except that a clipped end of the range can be off by a whole one."""
    if refused(implementation, "quantize", spec):
        return
    w = np.random.default_rng(5).standard_normal((16, 256)).astype(np.float32)
    qw = jaxq.quantize(w, bits=spec.bits, group_size=spec.group_size, mode=spec.mode, implementation=implementation)
    error = np.abs(dense(qw) - w).reshape(16, -1, spec.group_size).max(-1)
    groups = w.reshape(16, -1, spec.group_size)
    if spec.is_affine:
        # The step after the edge is made a code exactly: at most range / (2**bits - 1 - 1/2), as the edge's code was
        # rounded by at most 1/2.
        step = (groups.max(-1) - groups.min(-1)) / max(spec.max_code - 0.5, 1)
        assert (error <= step * (1 + 1e-5)).all()
    else:
        # E2M1's widest gap is 2 of 6, E4M3's 32 of 448; a scale is at most twice what the peak needs (E4M3: 9/8).
        gap = (2 / 6 if spec.bits == 4 else 32 / 448) * (9 / 8 if spec.mode == "nvfp4" else 2)
        assert (error <= np.abs(groups).max(-1) * gap / 2 * (1 + 1e-5) + 2**-9).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [jaxq.QuantSpec(4, 32), jaxq.QuantSpec(3, 64), *FLOAT], ids=str)
def test_poison(spec, dtype, value, implementation):
    """A NaN or an infinity makes its own group NaN, and no other."""
    if refused(implementation, "quantize", spec):
        return
    w = np.random.default_rng(5).standard_normal((4, 256)).astype(np.float32)
    w[1, 70] = value
    qw = jaxq.quantize(
        jnp.asarray(w).astype(dtype),
        bits=spec.bits,
        group_size=spec.group_size,
        mode=spec.mode,
        implementation=implementation,
    )
    first = 70 // spec.group_size * spec.group_size
    expected = np.zeros((4, 256), bool)
    expected[1, first : first + spec.group_size] = True
    np.testing.assert_array_equal(np.isnan(dense(qw)), expected)
    np.testing.assert_array_equal(np.isnan(jaxq.dequantize(qw, implementation=implementation)), expected)


@pytest.mark.parametrize("axis", [-1, -2, -3, (-3, -2), (-1, -3), 0])
def test_axis(axis):
    """Grouping along an axis is grouping along the last one of the transposed weight."""
    w = np.random.default_rng(2).standard_normal((64, 128, 192)).astype(np.float32)
    qw = jaxq.quantize(w, group_size=64, axis=axis)
    assert qw.shape == w.shape
    axes = (axis,) if isinstance(axis, int) else axis
    last = [a % 3 for a in axes]
    order = [a for a in range(3) if a not in last] + last
    direct = jaxq.quantize(w.transpose(order), group_size=64)
    jax.tree.map(np.testing.assert_array_equal, qw.leaves, direct.leaves)
    np.testing.assert_array_equal(jaxq.dequantize(qw), jaxq.dequantize(direct).transpose(np.argsort(order)))
