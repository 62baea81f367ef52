"""Equinox: `quantize(model, ...)` gives the same model with quantized weights, which runs like any other.

Equinox's layers multiply by `self.weight @ x` and look rows up by `self.weight[i]`, and a QuantizedArray does both, so
only leaves are replaced: no class but that of embeddings in the float modes changes, and `jax.vmap(model)`,
`eqx.filter_jit`, `eqx.partition` and `eqx.tree_serialise_leaves` work as before.
"""

from __future__ import annotations

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxq.array import is_quantized
from jaxq.conventions import Axis, Rules, path_string
from jaxq.progress import Progress
from jaxq.reports import Report
from jaxq.tree import quantize_leaves

Model = TypeVar("Model")

# Which fields of which layers are operands of `@` or rows to look up, all of them [..., out, in].
_LAYERS: dict[type, tuple[str, ...]] = {
    eqx.nn.Linear: ("weight",),
    eqx.nn.Embedding: ("weight",),
    eqx.nn.GRUCell: ("weight_ih", "weight_hh"),
    eqx.nn.LSTMCell: ("weight_ih", "weight_hh"),
}
# These compute a new weight from that of the layer that they hold, on every call.
_WRAPPERS = (eqx.nn.WeightNorm, eqx.nn.SpectralNorm)


class QuantizedEmbedding(eqx.nn.Embedding):
    """An Embedding whose rows come out in the dtype that its weight had.

    The float modes store no float to take a dtype from; all their values are exact in bfloat16, but a model of float32
    would go on in bfloat16.
    """

    dtype: Any = eqx.field(static=True)

    def __init__(self, embedding: eqx.nn.Embedding, dtype: Any):
        self.num_embeddings = embedding.num_embeddings
        self.embedding_size = embedding.embedding_size
        self.weight = embedding.weight
        self.dtype = np.dtype(dtype)

    def __call__(self, x: Any, *, key: Any = None) -> jax.Array:
        """The row of one index, `dtype[embedding_size]`."""
        return jnp.astype(super().__call__(x), self.dtype)


def quantize(
    model: Model,
    spec_or_rules: Rules,
    *,
    donate: bool = False,
    progress: Progress = None,
    report: Report | None = None,
    implementation: str | None = None,
) -> Model:
    """An Equinox model with the weights of its Linear, Embedding, GRUCell and LSTMCell layers quantized.

    MLP, MultiheadAttention, Sequential and modules of one's own are made of these. Layers that were stacked by
    `eqx.filter_vmap` over their construction are quantized whole. Everything else stays as it is, and is listed in the
    report; a rule that names an axis, or a function, may ask for a weight of a module of one's own, which must then use
    it by `@` or by `weight[i]`. Paths are those of the model's fields: `layers/0/weight`.

    To train beside frozen weights, partition: `eqx.filter_grad` of the whole model gives gradients to scales and
    biases. To load one that was saved by `eqx.tree_serialise_leaves`, quantize a skeleton:
    `eqx.tree_deserialise_leaves(path, eqx.filter_eval_shape(make_quantized_model, key))`.

    Args:
      model: any Equinox module, or tree of them.
      spec_or_rules, donate, progress, report, implementation: as in `jaxq.quantize_tree`.

    Raises:
      ValueError: a weight with a NaN or an infinity in it, named by its path.
      TypeError: rules in none of the three forms.
    """
    weights = _weights(model)
    flat, treedef = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_quantized)
    leaves = [(path_string(path), leaf) for path, leaf in flat]

    def convention(path: str, leaf: Any) -> tuple[Axis, str]:
        return -1, weights.get(path, "no weight of a Linear, Embedding, GRUCell or LSTMCell")

    results = quantize_leaves(
        "integrations.equinox.quantize",
        leaves,
        spec_or_rules,
        convention,
        donate=donate,
        progress=progress,
        report=report,
        implementation=implementation,
    )
    quantized = jax.tree.unflatten(treedef, results)
    dtypes = {path: leaf.dtype for path, leaf in leaves if hasattr(leaf, "dtype") and not is_quantized(leaf)}
    return jax.tree_util.tree_map_with_path(
        lambda path, node: _keep_dtype(node, dtypes.get(_join(path, "weight"))), quantized, is_leaf=_is_embedding
    )


def _weights(model: Any) -> dict[str, str]:
    """The paths of the layers' weights, each with the reason why it must stay dense; "" if it need not."""
    layers, _ = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda node: isinstance(node, (*_LAYERS, *_WRAPPERS))
    )
    weights = {}
    for path, layer in layers:
        if isinstance(layer, _WRAPPERS):
            name = _join(path, "layer", layer.weight_name)
            weights[name] = f"recomputed by {type(layer).__name__} on every call"
        for base, names in _LAYERS.items():
            if isinstance(layer, base):
                weights.update((_join(path, name), "") for name in names)
    return weights


def _join(path: Any, *names: str) -> str:
    return path_string((*path, *(jax.tree_util.GetAttrKey(name) for name in names)))


def _is_embedding(node: Any) -> bool:
    return isinstance(node, eqx.nn.Embedding)


def _keep_dtype(node: Any, dtype: Any) -> Any:
    """`node`, or where it is an embedding that was of `dtype` and would look up another, one that does not."""
    if _is_embedding(node) and is_quantized(node.weight) and dtype is not None and node.weight.float_dtype != dtype:
        return QuantizedEmbedding(node, dtype)
    return node
