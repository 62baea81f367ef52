"""jax.shard_map over meshes of both kinds, with its check of which axes values vary over; see also test_partition."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq

SPEC = jaxq.QuantSpec(4, 32)
# (x, weight, result, whether partial products are summed): what is split over the mesh axis "i".
LAYOUTS = {
    "column": (P(), P("i", None), P(None, "i"), False),
    "row": (P(None, "i"), P(None, "i"), P(), True),
    "batch": (P("i", None), P(), P("i", None), False),
}


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return jax.make_mesh((8,), ("i",), axis_types=(request.param,))


def by_hand(f, mesh, layout):
    x, w, y, summed = LAYOUTS[layout]

    def local(x, w):
        return jax.lax.psum(f(x, w), "i") if summed else f(x, w)

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(x, w), out_specs=y, check_vma=True))


def put(mesh, layout, x, w):
    return [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip((x, w), LAYOUTS[layout], strict=False)]


@pytest.mark.parametrize("implementation", [name for name in cases.IMPLEMENTATIONS if ":" not in name])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_product(mesh, layout, implementation):
    weight, x = cases.weight(SPEC, (32, 256)), cases.activations((8, 256))

    def product(x, w):
        return jaxq.quantized_matmul(x, w, implementation=implementation)

    y = by_hand(product, mesh, layout)(*put(mesh, layout, x, weight.qw))
    error = np.abs(np.asarray(y, np.float64) - oracle.matmul(np.asarray(x), weight.dense, transpose=True))
    assert (error <= cases.matmul_bound(x, weight.qw, weight.dense, transpose=True)).all()
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, LAYOUTS[layout][2]), y.ndim)


@pytest.mark.parametrize("implementation", [name for name in cases.IMPLEMENTATIONS if ":" not in name])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivative(mesh, layout, implementation):
    weight, x = cases.weight(SPEC, (32, 256)), cases.activations((8, 256))
    f = by_hand(lambda x, w: jaxq.quantized_matmul(x, w, implementation=implementation), mesh, layout)
    gradient = jax.jit(jax.grad(lambda x, w: jnp.sum(f(x, w))))(*put(mesh, layout, x, weight.qw))
    ones = np.ones((8, 32))
    error = np.abs(np.asarray(gradient, np.float64) - oracle.matmul(ones, weight.dense, transpose=False))
    assert (error <= cases.matmul_bound(jnp.asarray(ones, "float32"), weight.qw, weight.dense, transpose=False)).all()


def test_resident_weights(mesh):
    if "mlx" not in cases.IMPLEMENTATIONS:
        pytest.skip("needs mlx")
    weight, x = cases.weight(SPEC, (32, 256)), cases.activations((8, 256))
    with jaxq.resident(weight.qw) as held:
        y = by_hand(lambda x, w: x @ w.T, mesh, "batch")(*put(mesh, "batch", x, held))
        error = np.abs(np.asarray(y, np.float64) - oracle.matmul(np.asarray(x), weight.dense, transpose=True))
        assert (error <= cases.matmul_bound(x, weight.qw, weight.dense, transpose=True)).all()
        with pytest.raises(ValueError, match=r"partitioned over 8 devices.*jax\.shard_map"):
            jax.jit(lambda x, w: x @ w.T)(*put(mesh, "batch", x, held))
