"""Train the byte-level model that ships with the example, on the text of the standard library.

    python -m examples.llm.train --out examples/llm/pystdlib

Matrices inside the layers are trained with Muon (momentum, orthogonalized by Newton-Schulz iterations; Jordan et al.,
https://kellerjordan.github.io/posts/muon/), the rest with Adam. Runs on whatever JAX finds: the defaults took a minute
on an H200, and would take hours on a CPU. A run is a function of its arguments: batches are drawn from a key and the
step's number, and a run that was interrupted goes on from its last checkpoint (`--state`) as if it had not been.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from safetensors.numpy import load_file, save_file

from examples.llm import corpus, model
from examples.llm.config import Config, from_json

MATRICES = ("qkv", "gate_up", "out", "down")


def config_json(args: argparse.Namespace) -> dict[str, Any]:
    """The model as Hugging Face's `config.json` says it: Qwen3 over bytes."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": corpus.VOCABULARY,
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": args.hidden // 128,
        "head_dim": 64,
        "max_position_embeddings": args.length,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": corpus.BEGIN,
        "pad_token_id": corpus.PAD,
        "tokenizer": "bytes",
    }


def init(config: Config, key: jax.Array) -> model.Params:
    """Float32 parameters, layers stacked; what writes into the residual stream starts at zero."""
    depth, hidden, inner = config.num_layers, config.hidden_size, config.intermediate_size
    keys = iter(jax.random.split(key, 8))

    def matrix(rows: int, columns: int) -> jax.Array:
        return jax.random.normal(next(keys), (depth, rows, columns)) * columns**-0.5

    layers = {
        "attention_norm": jnp.ones((depth, hidden)),
        "mlp_norm": jnp.ones((depth, hidden)),
        "q_norm": jnp.ones((depth, config.head_dim)),
        "k_norm": jnp.ones((depth, config.head_dim)),
        "qkv": (matrix(config.q_size, hidden), matrix(config.kv_size, hidden), matrix(config.kv_size, hidden)),
        "out": jnp.zeros((depth, hidden, config.q_size)),
        "gate_up": (matrix(inner, hidden), matrix(inner, hidden)),
        "down": jnp.zeros((depth, hidden, inner)),
    }
    return {
        "embed": jax.random.normal(next(keys), (config.vocab_size, hidden)) * 0.5,
        "head": jnp.zeros((config.vocab_size, hidden)),
        "norm": jnp.ones(hidden),
        "segments": (layers,),
    }


class OneHot:
    """A table whose look-up is a product: the gradient of a gather adds tens of thousands of rows into 272, one after
    the other, which is most of a step on a GPU."""

    def __init__(self, table: jax.Array):
        self.table = table

    def __getitem__(self, tokens: jax.Array) -> jax.Array:
        return jax.nn.one_hot(tokens, self.table.shape[0], dtype=self.table.dtype) @ self.table


def loss(config: Config, params: model.Params, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Mean cross entropy in nats of tokens[:, 1:]; tokens: int[B, S + 1]."""
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    params |= {"embed": OneHot(params["embed"])}
    logits = model.forward(config, params, tokens[:, :-1], dtype)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None].astype(jnp.int32), axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


# ---- optimizer


def is_matrix(path: Any) -> bool:
    return any(getattr(entry, "key", None) in MATRICES for entry in path)


def orthogonalize(update: jax.Array) -> jax.Array:
    """The nearest semi-orthogonal matrix, roughly: five Newton-Schulz steps in bfloat16. float[..., N, K]."""
    x = update.astype(jnp.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (jnp.linalg.norm(x.astype(jnp.float32), axis=(-2, -1), keepdims=True) + 1e-7).astype(x.dtype)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.mT if tall else x
    return x.astype(jnp.float32) * max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5


def start_state(params: Any) -> dict[str, Any]:
    """Moments of zero; the second ones of Muon's matrices are never used."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return {"params": params, "first": zeros(params), "second": zeros(params), "step": jnp.int32(0)}


def apply(state: Any, grads: Any, args: argparse.Namespace) -> Any:
    """One step of the optimizer: the new state."""
    scale, t = schedule(state["step"], args), (state["step"] + 1).astype(jnp.float32)

    def one(path: Any, p: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array) -> Any:
        if is_matrix(path):
            m = 0.95 * m + g
            return p * (1 - scale * args.decay) - scale * args.muon_rate * orthogonalize(g + 0.95 * m), m, v
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        change = (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.95**t)) + 1e-10)
        return p - scale * args.adam_rate * change, m, v

    leaves, tree = jax.tree_util.tree_flatten_with_path(state["params"])
    others = [jax.tree.leaves(part) for part in (grads, state["first"], state["second"])]
    done = [one(path, p, *rest) for (path, p), *rest in zip(leaves, *others, strict=True)]
    new = [jax.tree.unflatten(tree, part) for part in zip(*done, strict=True)]
    return {"params": new[0], "first": new[1], "second": new[2], "step": state["step"] + 1}


def schedule(step: jax.Array, args: argparse.Namespace) -> jax.Array:
    """Up over the first `warmup` steps, 1 until `cooldown` of all steps are left, then down to 0 in a line."""
    t = step.astype(jnp.float32)
    return jnp.minimum(1.0, (t + 1) / args.warmup) * jnp.clip((args.steps - t) / (args.cooldown * args.steps), 0.0, 1.0)


# ---- the run


def chunk(config: Config, args: argparse.Namespace, state: Any, text: jax.Array) -> Any:
    """`args.chunk` steps in one program: the new state, and the losses in nats, float32[chunk]."""

    def step(state: Any, _: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(args.seed), state["step"])
        starts = jax.random.randint(key, (args.batch, 1), 0, len(text) - args.length - 1)
        tokens = text[starts + jnp.arange(args.length + 1)]
        value, grads = jax.value_and_grad(functools.partial(loss, config))(state["params"], tokens, jnp.bfloat16)
        return apply(state, grads, args), value

    return lax.scan(step, state, length=args.chunk)


def evaluate(config: Config, params: Any, windows: np.ndarray) -> float:
    """Bits per byte on held-out windows."""
    measure = jax.jit(functools.partial(loss, config, dtype=jnp.bfloat16))
    return float(np.mean([float(measure(params, tokens=w)) for w in np.split(windows, len(windows) // 8)])) / np.log(2)


def save(path: Path, tensors: dict[str, Any]) -> None:
    """Write aside, then rename: a run that is killed leaves a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, aside, {"format": "mlx"})
    os.replace(aside, path)


def flat(state: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def checkpoint(params: Any) -> dict[str, Any]:
    """The parameters under Hugging Face's names, in bfloat16."""
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names |= {f"{part}_norm": f"self_attn.{part}_norm" for part in "qk"}
    layers = dict(params["segments"][0])
    layers |= dict(zip(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), layers.pop("qkv"), strict=True))
    layers |= dict(zip(("mlp.gate_proj", "mlp.up_proj"), layers.pop("gate_up"), strict=True))
    layers |= {"self_attn.o_proj": layers.pop("out"), "mlp.down_proj": layers.pop("down")}
    tensors = {"model.embed_tokens": params["embed"], "model.norm": params["norm"], "lm_head": params["head"]}
    for name, stacked in layers.items():
        tensors |= {f"model.layers.{i}.{names.get(name, name)}": stacked[i] for i in range(len(stacked))}
    return {f"{name}.weight": np.asarray(value.astype(jnp.bfloat16)) for name, value in tensors.items()}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        *(("hidden", 256), ("intermediate", 512), ("layers", 6), ("length", 512), ("batch", 64)),
        *(("steps", 3000), ("chunk", 100), ("warmup", 100), ("seed", 0)),
        *(
            ("muon_rate", 0.02),
            ("adam_rate", 0.003),
            ("decay", 0.004),
            ("cooldown", 0.5),
            ("minutes", 1e9),
            ("stop", 10**9),
        ),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, required=True, help="directory for config.json and model.safetensors")
    parser.add_argument("--state", type=Path, help="file to keep the run's state in, and to go on from")
    parser.add_argument("--root", type=Path, help="a standard library; that of this Python by default")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = from_json(config_json(args))
    text = jnp.asarray(corpus.stream(held_out=False, root=args.root))
    windows = corpus.windows(count=64, length=args.length, root=args.root)
    state = start_state(init(config, jax.random.key(args.seed)))
    if args.state and args.state.exists():
        kept = load_file(args.state)
        state = jax.tree_util.tree_map_with_path(
            lambda path, like: jnp.asarray(kept[jax.tree_util.keystr(path)]).reshape(like.shape), state
        )
    size = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    print(
        f"{size / 1e6:.2f} million parameters, {len(text) / 1e6:.2f} MB of text, from step {state['step']}", flush=True
    )
    run = jax.jit(functools.partial(chunk, config, args), donate_argnums=0)
    began = time.monotonic()
    while state["step"] < min(args.steps, args.stop) and time.monotonic() - began < args.minutes * 60:
        before = time.monotonic()
        state, losses = run(state, text)
        bits = float(losses.mean()) / np.log(2)
        speed = args.chunk * args.batch * args.length / (time.monotonic() - before)
        print(f"step {state['step']}: {bits:.3f} bits per byte, {speed:.0f} bytes/s", flush=True)
    if args.state:
        save(args.state, flat(state))
    save(args.out / "model.safetensors", checkpoint(state["params"]))
    (args.out / "config.json").write_text(json.dumps(config_json(args), indent=2) + "\n")
    print(f"held out: {evaluate(config, state['params'], windows):.4f} bits per byte", flush=True)


if __name__ == "__main__":
    main()
