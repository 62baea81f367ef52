"""Every use of JAX that its documented API does not cover, each with its reason.

Most are undocumented attributes of public objects; what comes from `jax._src` says why. Checked on jax 0.10.2 to 0.12.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.sharding import PartitionSpec


def result_aval(operands: Sequence[Any], shape: Sequence[int], dtype: Any, spec: Sequence[Any]) -> Any:
    """The abstract value of a result, on the operands' mesh, partitioned as `spec` says.

    There is no public constructor that carries the mesh and the manual axes (the `varying` set of `jax.shard_map`);
    `update` of an operand's abstract value keeps both.
    """
    source = max(operands, key=lambda aval: len(aval.sharding.mesh.axis_names))
    sharding = source.sharding.update(spec=PartitionSpec(*spec))
    return source.update(shape=tuple(shape), dtype=np.dtype(dtype), weak_type=False, sharding=sharding)


def partition(aval: Any) -> tuple[Any, ...]:
    """Which mesh axes partition each dimension, where the mesh is explicit; a tuple of None elsewhere."""
    spec = tuple(aval.sharding.spec)
    return spec + (None,) * (len(aval.shape) - len(spec))


def align_varying(*operands: Any) -> tuple[Any, ...]:
    """The operands, each cast to vary over every manual mesh axis that any of them varies over.

    Inside `jax.shard_map` an operation's operands must agree in this; JAX's own primitives cast by themselves.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    union = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(x, tuple(sorted(union - own)), to="varying") if union - own else x
        for x, own in zip(operands, varying, strict=True)
    )


def unpartitioned(aval: Any) -> Any:
    """The abstract value without a mesh: for tracing a lowering's body, which XLA then partitions by itself."""
    return jax.core.ShapedArray(aval.shape, aval.dtype)


def require_devices(primitive: Any) -> None:
    """Have JAX tell the devices of a program when it lowers `primitive`.

    `custom_partitioning` needs them and asks for them itself, but JAX looks for such primitives before lowering, and
    ours turns into one only then. JAX has no public way to say so.
    """
    prim_requires_devices_during_lowering.add(primitive)
