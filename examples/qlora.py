"""Fine-tune adapters beside a frozen 4-bit network: `python examples/qlora.py`.

A network learns scikit-learn's handwritten digits. Then the digits are turned by a quarter, and only adapters of rank
16 (LoRA, Hu et al., 2021) learn to read those: once beside the dense weights, once beside the same weights in 4 bits
(QLoRA, Dettmers et al., 2023). The network and its loss are the same code for both; `jaxq.dispatch` makes the products
with 4-bit weights fused, in the backward pass as well. `--train` says what else learns: the scales and the biases of
the quantized weights are floats, and have gradients like any other.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from digits import load

import jaxq

RANK = 16
BATCH = 128
Tree = Any


def network(params: Tree, adapters: Tree, x: jax.Array) -> jax.Array:
    """x: float32[batch, 64] -> float32[batch, 10], the logits. Kernels are [in, out]; adapters may be None."""
    for i, layer in enumerate(params):
        y = x @ layer["kernel"] + layer["bias"]
        if adapters is not None:
            y = y + (x @ adapters[i]["lora_a"]) @ adapters[i]["lora_b"]
        x = jax.nn.relu(y) if i + 1 < len(params) else y
    return x


def loss(params: Tree, adapters: Tree, x: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(network(params, adapters, x), labels).mean()


def init(widths: list[int]) -> tuple[Tree, Tree]:
    """Parameters, and adapters that add nothing yet."""
    params, adapters = [], []
    keys = jax.random.split(jax.random.key(0), 2 * len(widths))
    for i, (k, n) in enumerate(itertools.pairwise(widths)):
        params.append({"kernel": jax.random.normal(keys[2 * i], (k, n)) * (2 / k) ** 0.5, "bias": jnp.zeros(n)})
        down = jax.random.normal(keys[2 * i + 1], (k, RANK)) * k**-0.5
        adapters.append({"lora_a": down, "lora_b": jnp.zeros((RANK, n))})
    return params, adapters


# ---- what is trained, and what is frozen


def split(params: Tree, adapters: Tree, names: list[str]) -> Tree:
    """The trained leaves: the adapters, and of each quantized kernel its scales or biases if `names` has them."""
    kernels = [layer["kernel"] for layer in params]
    held = [{name: getattr(q, name) for name in names if name != "adapters"} for q in kernels if jaxq.is_quantized(q)]
    return {"adapters": adapters if "adapters" in names else None, "kernels": held}


def merge(params: Tree, adapters: Tree, trained: Tree) -> tuple[Tree, Tree]:
    """The parameters and adapters with the trained leaves in place."""
    held = iter(trained["kernels"])
    params = [layer | {"kernel": _replaced(layer["kernel"], held)} for layer in params]
    return params, adapters if trained["adapters"] is None else trained["adapters"]


def _replaced(kernel: Any, held: Any) -> Any:
    if not jaxq.is_quantized(kernel):
        return kernel
    leaves = {"scales": kernel.scales, "biases": kernel.biases} | next(held)
    return jaxq.QuantizedArray(kernel.packed, **leaves, spec=kernel.spec, axis=kernel.axis)


def train_step(optimizer: optax.GradientTransformation) -> Any:
    """(trained, state, frozen, x, labels) -> (trained, state, loss), for jit."""

    def trained_loss(trained: Tree, frozen: Tree, x: jax.Array, labels: jax.Array) -> jax.Array:
        # Put together outside: inside a dispatched function a quantized weight looks dense.
        return jaxq.dispatch(loss)(*merge(*frozen, trained), x, labels)

    def step(trained: Tree, state: Tree, frozen: Tree, x: jax.Array, labels: jax.Array) -> tuple[Tree, Tree, jax.Array]:
        value, grads = jax.value_and_grad(trained_loss)(trained, frozen, x, labels)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    return step


def train(trained: Tree, frozen: Tree, data: tuple[jax.Array, jax.Array], steps: int, rate: float) -> dict[str, Any]:
    """Adam for so many steps. Returns what was trained, losses, milliseconds per step, and the step's memory."""
    # Adam moves every number by about the rate; scales and biases are some hundredths, and each moves 64 weights.
    rates = {"adapters": optax.adam(rate), "kernels": optax.adam(rate / 100)}
    optimizer = optax.multi_transform(rates, {"adapters": "adapters", "kernels": "kernels"})
    state = optimizer.init(trained)
    images, labels = data
    order = jax.random.randint(jax.random.key(1), (steps, BATCH), 0, len(labels))
    step = jax.jit(train_step(optimizer), donate_argnums=(0, 1))
    step = step.lower(trained, state, frozen, images[order[0]], labels[order[0]]).compile()
    memory = step.memory_analysis()
    losses = []
    start = time.perf_counter()
    for batch in order:
        trained, state, value = step(trained, state, frozen, images[batch], labels[batch])
        losses.append(value)
    losses = [float(value) for value in losses]
    return {
        "trained": trained,
        "losses": losses,
        "ms": (time.perf_counter() - start) * 1e3 / steps,
        "state": nbytes((trained, state)),
        "temporaries": memory.temp_size_in_bytes,
    }


def nbytes(tree: Tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def pretrain(params: Tree, data: tuple[jax.Array, jax.Array], steps: int) -> Tree:
    """All the dense weights, by Adam on the upright digits."""
    images, labels = data
    optimizer = optax.adam(1e-3)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Tree, batch: jax.Array) -> Tree:
        params, state = carry
        grads = jax.grad(loss)(params, None, images[batch], labels[batch])
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    carry = (params, optimizer.init(params))
    for batch in jax.random.randint(jax.random.key(2), (steps, BATCH), 0, len(labels)):
        carry = step(carry, batch)
    return carry[0]


def turn(images: jax.Array) -> jax.Array:
    """8 x 8 images turned by a quarter, float32[n, 64]."""
    return jnp.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)


def accuracy(params: Tree, adapters: Tree, images: jax.Array, labels: jax.Array) -> float:
    return float((jax.jit(jaxq.dispatch(network))(params, adapters, images).argmax(-1) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024, help="width of the three hidden layers")
    parser.add_argument("--pretrain", type=int, default=60, help="steps on the upright digits")
    parser.add_argument("--steps", type=int, default=100, help="steps of fine-tuning on the turned digits")
    parser.add_argument(
        "--train", nargs="+", default=["adapters"], choices=["adapters", "scales", "biases"], help="what learns"
    )
    args = parser.parse_args()
    images, labels, test_images, test_labels = load()
    dense, adapters = init([64, args.hidden, args.hidden, args.hidden, 10])
    dense = pretrain(dense, (images, labels), args.pretrain)
    report = jaxq.Report()
    quantized = jaxq.quantize_tree(dense, jaxq.QuantSpec(4, 64), report=report)
    print(report, end="\n\n")

    test = turn(test_images)
    print(f"{'':12} {'weights':>10} {'trained':>10} {'temporaries':>12} {'ms/step':>8} {'loss':>15} {'accuracy':>15}")
    for name, params, names in (("dense LoRA", dense, ["adapters"]), ("4-bit QLoRA", quantized, args.train)):
        frozen = (params, adapters)
        # A copy, since the step frees what it is given.
        trained = jax.tree.map(jnp.copy, split(params, adapters, names))
        result = train(trained, frozen, (turn(images), labels), args.steps, 2e-3)
        before = accuracy(params, None, test, test_labels)
        after = accuracy(*merge(*frozen, result["trained"]), test, test_labels)
        first, last = result["losses"][0], sum(result["losses"][-10:]) / len(result["losses"][-10:])
        print(
            f"{name:12} {nbytes(params):10,} {result['state']:10,} {result['temporaries']:12,} {result['ms']:8.1f} "
            f"{f'{first:.3f} -> {last:.3f}':>15} {f'{before:.1%} -> {after:.1%}':>15}"
        )
    print("\nBytes of the weights; of what learns and its optimizer's state; and of everything else that a step needs,")
    print(
        "from XLA's own analysis of the compiled step. Loss on the turned digits; accuracy on 360 test images of them."
    )


if __name__ == "__main__":
    main()
