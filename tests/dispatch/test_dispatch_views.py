"""What code does to a weight before the dot: transposes, reshapes, casts, slices, joins act on the packed data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dispatch_checks import bound, check, dense, normal, weight
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxq

X = normal(5, 96)
W = weight(64, 96)
KERNEL = weight(96, 64, axis=-2)
SQUARE = weight(96, 96, axis=-2)
STACK = weight(3, 64, 96)

FUSED = {
    "reshape rows into heads and back": (lambda x, w: x @ w.reshape(4, 16, 96).reshape(64, 96).T, X, W),
    "reshape the result axis into heads": (lambda x, w: jnp.tensordot(x, w.T.reshape(96, 4, 16), 1), X, W),
    "reshape the grouped axis": (lambda x, w: jnp.einsum("bcd,ocd->bo", x, w.reshape(64, 3, 32)), normal(5, 3, 32), W),
    "ravel": (lambda x, w: w.ravel() @ x, normal(64 * 96), W),
    "leading axis of one": (lambda x, w: jnp.matmul(x[None], w.T[None]), X, W),
    "axes of one in between": (lambda x, w: jnp.einsum("bi,oai->boa", x, w[:, None]), X, W),
    "squeeze": (lambda x, w: x @ jnp.squeeze(w[None, :, None], (0, 2)).T, X, W),
    "permute three axes": (lambda x, w: jnp.einsum("bi,oie->beo", x, w.transpose(1, 2, 0)), X, STACK),
    "cast twice": (lambda x, w: x @ w.astype(jnp.float16).astype(jnp.float32).T, X, W),
    "stop_gradient": (lambda x, w: x @ lax.stop_gradient(w).T, X, W),
    "optimization_barrier": (lambda x, w: x @ lax.optimization_barrier(w).T, X, W),
    "copy": (lambda x, w: x @ jnp.array(w, copy=True).T, X, W),
    "checkpoint_name": (lambda x, w: x @ checkpoint_name(w, "w").T, X, W),
    "slice rows": (lambda x, w: x @ w[:32].T, X, W),
    "slice rows with a stride": (lambda x, w: x @ w[::2].T, X, W),
    "slice whole groups": (lambda x, w: x[:, 32:64] @ w[:, 32:64].T, X, W),
    "lax.dynamic_slice of rows": (lambda x, w: x @ lax.dynamic_slice(w, (3, 0), (16, 96)).T, X, W),
    "one of a stack": (lambda x, w: x @ w[1].T, X, STACK),
    "the last of a stack": (lambda x, w: x @ w[-1].T, X, STACK),
    "concatenate": (lambda x, w: x @ jnp.concatenate([w, w]).T, X, W),
    "concatenate the grouped axis": (lambda x, w: x @ jnp.concatenate([w, w], 1).T, normal(5, 192), W),
    "stack": (lambda x, w: jnp.einsum("bi,eio->beo", x, jnp.stack([w, w])), X, SQUARE),
    "stack in the middle": (lambda x, w: jnp.einsum("bi,ieo->beo", x, jnp.stack([w, w], axis=1)), X, SQUARE),
}


@pytest.mark.parametrize("name", FUSED)
def test_view(name):
    f, x, w = FUSED[name]
    products = 8 if name == "ravel" else 1  # |w| of the whole matrix is that of a row times sqrt(64)
    # The dense model rounds the cast weights, the fused one never does.
    tolerance = bound(96, 2 * 96**0.5, dtype=jnp.float16) if name == "cast twice" else None
    check(f, x, w, fused=1, products=products, tolerance=tolerance)


def test_split():
    check(lambda x, w: [x @ part for part in jnp.split(w.T, 2, axis=1)], X, W, fused=2)


def test_split_groups():
    def f(x, w):
        return sum(a @ b.T for a, b in zip(jnp.split(x, [32], 1), jnp.split(w, [32], 1), strict=True))

    check(f, X, W, fused=2, products=2)


def test_unstack():
    check(lambda x, w: [x @ part.T for part in jnp.unstack(w)], X, STACK, fused=3)
    check(lambda x, w: [x @ part for part in jnp.unstack(w.transpose(1, 2, 0), axis=2)], normal(5, 64), STACK, fused=3)


def test_dynamic_index():
    check(lambda i, x, w: x @ w[i].T, jnp.array(1), X, STACK, fused=1)


DENSE = {
    "part of a group": lambda x, w: x[:, :5] @ w[:, :5].T,
    "every other column": lambda x, w: x[:, ::2] @ w[:, ::2].T,
    "groups split by a reshape": lambda x, w: jnp.einsum("bcd,ocd->bo", x.reshape(5, 12, 8), w.reshape(64, 12, 8)),
    "axes merged out of order": lambda x, w: w.T.reshape(-1)[:5, None] * x,
    "add": lambda x, w: x @ (w + 1.0).T,
    "scale": lambda x, w: x @ (w * 0.5).T,
    "broadcast": lambda x, w: jnp.matmul(x[None], jnp.broadcast_to(w.T, (2, 96, 64))),
    "sort": lambda x, w: x @ jnp.sort(w, axis=0).T,
    "norm": lambda x, w: x * jnp.linalg.norm(w),
    "cast to int": lambda x, w: x * w.astype(jnp.int32).sum().astype(jnp.float32),
}


@pytest.mark.parametrize("name", DENSE)
def test_becomes_dense(name):
    # w + 1 has rows of a norm up to 11 (sqrt(96) and 1); the norm of the whole matrix is that of a row times 8.
    check(DENSE[name], X, W, fused=0, dense_weights=1, dots=None, products=11)


def test_joining_unlike_weights():
    check(lambda x, a, b: x @ jnp.concatenate([a, b]).T, X, W, weight(64, 96, bits=8), fused=0, dense_weights=2, dots=1)


# ---- look-ups


def rows(f, ids, w, *, transform=jaxq.dispatch):
    """`f(ids, w)`, which reads rows: those of the dense weight, and no more than they is made dense."""
    run = transform(f)
    # scales * code + biases, rounded to float32 once by NumPy and once or twice by XLA: an ulp of |w| < 1, or of 7.
    np.testing.assert_allclose(jax.jit(run)(ids, w), f(ids, dense(w)), rtol=1e-6, atol=1e-7)
    sizes = []

    def walk(jaxpr):
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            if eqn.primitive.name == "dequantize":
                sizes.append(eqn.outvars[0].aval.size)
            for value in eqn.params.values():
                if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                    walk(value)

    jaxpr = jax.make_jaxpr(run)(ids, w)
    walk(jaxpr)
    assert len(sizes) == 1 and sizes[0] <= jax.eval_shape(f, ids, dense(w)).size, jaxpr


LOOKUPS = {
    "jnp.take": (lambda i, w: jnp.take(w, i, axis=0), jnp.array([1, 5, 63])),
    "jnp.take past the end": (lambda i, w: jnp.nan_to_num(jnp.take(w, i, axis=0), nan=7.0), jnp.array([1, 64, 99])),
    "jnp.take, clipped": (lambda i, w: jnp.take(w, i, axis=0, mode="clip"), jnp.array([1, 64, 99])),
    "jnp.take, filled": (lambda i, w: jnp.take(w, i, axis=0, fill_value=2.0), jnp.array([1, 64, -99])),
    "w[ids]": (lambda i, w: w[i], jnp.array([[1, 5], [63, 2]])),
    "w.at[ids].get": (lambda i, w: w.at[i].get(mode="fill", fill_value=0.0), jnp.array([1, 64])),
    "w[i]": (lambda i, w: w[i], jnp.array(3)),
    "w[3]": (lambda i, w: w[3] + i.astype(jnp.float32), jnp.array(0)),
    "lax.dynamic_index_in_dim": (lambda i, w: lax.dynamic_index_in_dim(w, i, 0), jnp.array(3)),
    "vmap of w[i]": (lambda i, w: jax.vmap(lambda i: w[i])(i), jnp.array([1, 5, 63])),
    "columns": (lambda i, w: w.T[:, i], jnp.array([1, 5, 63])),
    "columns, w.T.take": (lambda i, w: jnp.take(w.T, i, axis=1), jnp.array([1, 5, 63])),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_look_up(name):
    rows(*LOOKUPS[name], W)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("fill", [None, 0.0])
def test_look_up_float_modes(mode, fill):
    w = jaxq.quantize(normal(64, 96), mode=mode)

    def f(i, w):
        return jnp.nan_to_num(jnp.take(w, i, axis=0, fill_value=fill), nan=7.0)

    rows(f, jnp.array([1, 64, 63]), w)


def test_tied_embedding():
    """Rows are read, and the same weight is the head."""
    check(lambda i, w: w[i] @ w.T, jnp.array([1, 0, 2]), W, fused=1, dense_weights=1)


GATHERS = {
    "experts[ids]": lambda i, x, w: jnp.einsum("bd,bod->bo", x, w[i]),
    "jnp.take of experts": lambda i, x, w: jnp.einsum("bd,bod->bo", x, jnp.take(w, i, axis=0)),
    "experts of transposed weights": lambda i, x, w: jnp.einsum("bd,bdo->bo", x, w.transpose(0, 2, 1)[i]),
    "two experts per token": lambda i, x, w: jnp.einsum("bd,btod->bto", x, w[jnp.stack([i, i], 1)]),
    "vmap": lambda i, x, w: jax.vmap(lambda i, x: w[i] @ x)(i, x),
    "batched ids": lambda i, x, w: jax.vmap(lambda i, x, w: w[:, i] @ x, (0, 0, None))(i, x, w.transpose(1, 0, 2)),
}


@pytest.mark.parametrize("name", GATHERS)
def test_gathered_experts(name):
    """The experts' packed data is gathered; the product is one, with a batch axis."""
    check(GATHERS[name], jnp.array([1, 0, 2, 2, 1]), X, STACK, fused=1)


def test_look_up_across_groups():
    """Grouped along the axis that is read from: no row can be read alone."""
    check(lambda i, w: w[i], jnp.array([1, 5]), KERNEL, fused=0, dense_weights=1)


# ---- what comes out


@pytest.mark.parametrize(
    ("f", "w"),
    [
        pytest.param(lambda w: w, W, id="as it is"),
        pytest.param(lambda w: w.T, W, id="transposed"),
        pytest.param(lambda w: {"w": w.T.T}, KERNEL, id="transposed twice"),
        pytest.param(lambda w: w.transpose(2, 0, 1), weight(3, 32, 48, axis=(1, 2)), id="two grouped axes"),
        pytest.param(lambda w: w.transpose(1, 0, 2), weight(3, 32, 48), id="leading axes swapped"),
        pytest.param(jax.jit(lambda w: w.T), W, id="through jit"),
        pytest.param(lambda w: lax.scan(lambda c, w: (c, w.T), 0, w)[1], STACK, id="through scan"),
    ],
)
def test_weights_come_back_quantized(f, w):
    (got,) = jax.tree.leaves(jaxq.dispatch(f)(w), is_leaf=jaxq.is_quantized)
    (expected,) = jax.tree.leaves(f(dense(w)))
    assert jaxq.is_quantized(got) and got.spec == w.spec and len(got.axis) == len(w.axis)
    np.testing.assert_array_equal(dense(got), expected)


def test_computed_weights_come_back_dense():
    for f in (lambda w: w[:32], lambda w: w.astype(jnp.bfloat16), lambda w: w.reshape(4, 16, 96)):
        got = jaxq.dispatch(f)(W)
        assert isinstance(got, jax.Array)
        np.testing.assert_allclose(got, f(dense(W)), rtol=2**-7)  # an ulp of bfloat16: rounded once, or twice


def test_explicit_operations_inside():
    """quantize, dequantize and quantized_matmul may be called inside; an explicit dequantize is fused with its dot."""

    def f(x, w):
        return x @ jaxq.dequantize(jaxq.quantize(w, group_size=16)).T

    check(f, X, dense(W), fused=1)
    qw = jaxq.dispatch(lambda w: jaxq.quantize(w, group_size=16))(dense(W))
    assert jaxq.is_quantized(qw)


def test_looks_like_an_array():
    seen = {}

    def f(w):
        seen.update(array=isinstance(w, jax.Array), shape=w.shape, dtype=w.dtype, ndim=w.ndim, size=w.size)
        seen.update(result=jnp.result_type(w, jnp.float32), leaves=len(jax.tree.leaves(w)), T=w.T.shape)
        return 0

    jaxq.dispatch(f)(W)
    assert seen == {
        "array": True,
        "shape": (64, 96),
        "dtype": jnp.float32,
        "ndim": 2,
        "size": 64 * 96,
        "result": jnp.float32,
        "leaves": 1,
        "T": (96, 64),
    }
