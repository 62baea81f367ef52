"""Bad input is refused before any work, by an error that names function, argument, what came and what would do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import weight

import jaxq

SPEC = jaxq.QuantSpec(4, 32)
QW = weight(SPEC, (12, 128)).qw
STACK = weight(SPEC, (3, 12, 128)).qw
FORMAT = dict(bits=4, group_size=32)


def indexed(qw, index):
    return jaxq.quantized_matmul(jnp.ones((2, 128)), qw, index=index)


def from_packed(**changes):
    leaves = dict(packed=QW.packed, scales=QW.scales, biases=QW.biases) | changes
    return jaxq.QuantizedArray.from_packed(
        leaves["packed"], leaves["scales"], leaves["biases"], **(FORMAT | changes.get("format", {}))
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: jaxq.quantize(jnp.ones((8, 100))),
            ValueError,
            r"quantize: w\.shape\[-1\]=100 is not a multiple of group_size=64; pick a group_size that divides it "
            r"\(w\.shape=\(8, 100\)\)",
        ),
        (lambda: jaxq.quantize(jnp.ones(64)), ValueError, r"quantize: w\.shape=\(64,\) is of rank 1; .* two axes"),
        (lambda: jaxq.quantize(jnp.ones((2, 64), int)), TypeError, r"quantize: w\.dtype=int32 .* cast w to float32"),
        (lambda: jaxq.quantize(QW), TypeError, r"quantize: w is quantized already"),
        (
            lambda: jaxq.quantize(jnp.ones((2, 48)), bits=3, group_size=16),
            ValueError,
            r"quantize: .* whole 32-bit words",
        ),
        (lambda: jaxq.quantize(jnp.ones((2, 64)), bits=7), ValueError, r"QuantSpec: bits=7 is not legal"),
        (lambda: jaxq.quantize(jnp.ones((2, 64)), axis=2), ValueError, r"quantize: axis=2 is not legal for rank 2"),
        (lambda: jaxq.quantize(jnp.ones((2, 64)), axis=(0, 1)), ValueError, r"quantize: axis=\(0, 1\) is not legal"),
        (lambda: jaxq.dequantize(jnp.ones(3)), TypeError, r"dequantize: qw is a ArrayImpl; pass a QuantizedArray"),
        (lambda: jaxq.dequantize(QW, jnp.int32), TypeError, r"dequantize: dtype=int32 is not supported"),
        (
            lambda: jaxq.quantized_matmul(jnp.ones((2, 64)), QW),
            ValueError,
            r"quantized_matmul: x\.shape\[-1\]=64 does not match the 128 of the weight's grouped axis",
        ),
        (
            lambda: jaxq.quantized_matmul(jnp.ones((2, 64)), QW, transpose=False),
            ValueError,
            r"quantized_matmul: x\.shape\[-1\]=64 does not match the 12 of the weight's other axis",
        ),
        (
            lambda: jaxq.quantized_matmul(jnp.ones((2, 128), int), QW),
            TypeError,
            r"quantized_matmul: x\.dtype=int32; cast x to float32, float16 or bfloat16",
        ),
        (lambda: jaxq.quantized_matmul(QW, QW), TypeError, r"quantized_matmul: both operands are quantized"),
        (lambda: QW @ QW.T, TypeError, r"both operands of @ are quantized"),
        (lambda: jaxq.quantized_matmul(jnp.ones((2, 128)), jnp.ones(3)), TypeError, r"quantized_matmul: qw is a "),
        (lambda: jaxq.quantized_matmul(jnp.float32(1), QW), ValueError, r"quantized_matmul: x is a scalar"),
        (
            lambda: jaxq.quantized_matmul(jnp.ones((4, 5, 128)), weight(SPEC, (3, 12, 128)).qw),
            ValueError,
            r"quantized_matmul: the batch axes of x, \(4,\), don't broadcast with the weight's, \(3,\)",
        ),
        (
            lambda: jaxq.quantized_matmul(jnp.ones((5, 128)), jaxq.quantize(jnp.ones((4, 64, 8)), axis=(0, 1))),
            ValueError,
            r"quantized_matmul: qw contracts 2 axes together",
        ),
        (
            lambda: indexed(QW, 0),
            ValueError,
            r"quantized_matmul: index needs a stack of weights, not qw\.shape=\(12, 128\)",
        ),
        (
            lambda: indexed(jaxq.quantize(jnp.ones((128, 3, 8)), axis=0), 0),
            ValueError,
            r"quantized_matmul: index needs a stack of weights, not qw\.shape=\(128, 3, 8\) with axis=-3",
        ),
        (lambda: indexed(STACK, 1.0), TypeError, r"quantized_matmul: index is float32; pass an int"),
        (
            lambda: indexed(STACK, jnp.arange(2)),
            ValueError,
            r"quantized_matmul: index\.shape=\(2,\); pass a scalar, and use jax\.vmap for several at once",
        ),
        (lambda: indexed(STACK[:0], 0), ValueError, r"quantized_matmul: index into an empty stack"),
        (
            lambda: jaxq.quantize(jnp.ones((2, 64)), implementation="fast"),
            ValueError,
            r"quantize: implementation='fast' is unknown; pick one of .*xla, or None",
        ),
        (lambda: jaxq.use_implementation("fast").__enter__(), ValueError, r"use_implementation: implementation='fast'"),
        (
            lambda: jaxq.dequantize(QW, implementation="xla:avx2"),
            ValueError,
            r"dequantize: implementation='xla:avx2' can't be used here: it has no such variant",
        ),
        (
            lambda: from_packed(packed=QW.packed.astype(np.int32)),
            TypeError,
            r"from_packed: packed\.dtype=int32; it must be uint32",
        ),
        (lambda: from_packed(packed=QW.packed[0]), ValueError, r"from_packed: packed\.shape=\(16,\) is of rank 1"),
        (
            lambda: from_packed(scales=QW.scales[:, :3]),
            ValueError,
            r"from_packed: scales\.shape=\(12, 3\); packed\.shape=\(12, 16\) .* needs \(12, 4\)",
        ),
        (
            lambda: from_packed(scales=QW.scales.astype(np.int32)),
            TypeError,
            r"from_packed: scales\.dtype=int32; it must be float32 or float16 or bfloat16",
        ),
        (
            lambda: from_packed(biases=QW.biases.astype(jnp.bfloat16)),
            ValueError,
            r"from_packed: biases are bfloat16\[12, 4\]; they must match the scales, float32\[12, 4\]",
        ),
        (lambda: from_packed(biases=None), ValueError, r"from_packed: biases=None, but mode 'affine' needs biases"),
        (
            lambda: from_packed(format=dict(mode="mxfp4")),
            ValueError,
            r"from_packed: biases=an array, but mode 'mxfp4' has no biases",
        ),
        (
            lambda: from_packed(packed=QW.packed[:, :15]),
            ValueError,
            r"from_packed: packed\.shape\[-1\]=15 words hold 120 codes of 4 bits",
        ),
        (lambda: from_packed(scales=3.0), TypeError, r"from_packed: scales is a float; pass an array"),
    ],
)
def test_error(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_filled_tree_is_refused_by_leaf():
    holes = jax.tree.map(lambda _: None, QW, is_leaf=lambda x: x is QW.scales)
    with pytest.raises(TypeError, match=r"dequantize: packed of the quantized weight is a NoneType, not an array"):
        jaxq.dequantize(jax.tree.unflatten(jax.tree.structure(QW), [None, None, None]))
    assert isinstance(holes, jaxq.QuantizedArray)
