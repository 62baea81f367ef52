"""The language model against mlx-lm: checkpoints that mlx-lm writes give the same logits and the same tokens here."""

import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from examples.llm import generation, model
from examples.llm.config import from_json
from examples.llm.load import load
from examples.llm.sampling import Sampling

mx = pytest.importorskip("mlx.core")
utils = pytest.importorskip("mlx_lm.utils")
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

STEPS = 64
PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 23, 84]

BASE = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 160,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16, "beta_slow": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
FAMILIES = {
    "qwen3": {"model_type": "qwen3", "head_dim": 64, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2"},
    "llama": {"model_type": "llama", "rope_scaling": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "qwen3-yarn": {"model_type": "qwen3", "head_dim": 64, "rope_scaling": YARN},
    "llama-linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
}
INT4, INT8, MXFP4 = (
    {"bits": 4, "group_size": 64},
    {"bits": 8, "group_size": 64},
    {"bits": 4, "group_size": 32, "mode": "mxfp4"},
)


def mixed(path, module):
    """Formats that differ between layers and within one: fused products and scans must fall apart where they do."""
    if not hasattr(module, "to_quantized") or "layers.1.self_attn.o_proj" in path:
        return False
    return INT8 if "v_proj" in path or "layers.2.mlp.down" in path or "embed" in path else INT4


FORMATS = {"dense": None, "int4g64": INT4, "int8g64": INT8, "mixed": {**INT4, "quant_predicate": mixed}, "mxfp4": MXFP4}
CASES = [(family, form) for family in ("qwen3", "qwen2", "llama") for form in FORMATS]
CASES += [("qwen3-yarn", "dense"), ("llama-linear", "dense")]


def write_with_mlx_lm(directory, family, form):
    """A checkpoint of random weights as mlx-lm writes it, and mlx-lm's model of it."""
    config = BASE | FAMILIES[family]
    architecture = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    theirs = architecture.Model(architecture.ModelArgs.from_dict(config))
    rng = np.random.default_rng(5)

    def draw(name, like):
        scale = 0.1 if "norm" in name or "bias" in name else like.shape[-1] ** -0.5
        return mx.array((rng.normal(size=like.shape) * scale + ("norm" in name)).astype(np.float32))

    theirs.update(tree_unflatten([(name, draw(name, leaf)) for name, leaf in tree_flatten(theirs.parameters())]))
    if FORMATS[form] is not None:
        theirs, config = utils.quantize_model(theirs, config, **FORMATS[form])
    utils.save_model(directory, theirs)
    utils.save_config(config, directory / "config.json")
    return theirs


def their_logits_and_tokens(theirs):
    """Logits of every position of the prompt, and the greedy continuation."""
    cache = make_prompt_cache(theirs)
    logits = theirs(mx.array([PROMPT]), cache=cache)
    token = mx.argmax(logits[:, -1], axis=-1)
    tokens = [token.item()]
    for _ in range(STEPS - 1):
        token = mx.argmax(theirs(token[None], cache=cache)[:, -1], axis=-1)
        tokens.append(token.item())
    return np.array(logits[0]), tokens


def logit_bound(config, params, position, index):
    """How far apart two correct float32 evaluations of one logit may be, to first order in the unit roundoff u.

    A computed inner product of length K is the exact one of weights changed by at most c*u*sqrt(K) each, relatively,
    but for a probability below 2*exp(-c*c/2) (Higham and Mary, 2019, theorem 2.4). So the error of row n of a matrix W,
    carried on to the logit, is at most c*u*sqrt(K) * sum_k |W[n,k] * d logit / d W[n,k]|. Errors of different rows, and
    of matrices, are independent and add in quadrature. c = 6, and a factor of 2 for two evaluations. The same
    for the norms' weights, whose products carry about three roundings and the mean's; and, counted with them, the
    softmax and the rotation, which like the norms are short chains of roundings on vectors of one head. Quantized
    weights are taken as the dense ones that they stand for.
    """
    dense = jaxq.dequantize_tree(params, jnp.float32)
    # One structure for every format, so that one program serves all of them.
    for segment in dense["segments"]:
        for name in ("qkv", "gate_up"):
            segment[name] = (jnp.concatenate(segment[name], axis=1),)
    grads = _logit_gradient(config, dense, jnp.int32(position), jnp.int32(index))
    total = 0.0
    for w, g in zip(jax.tree.leaves(dense), jax.tree.leaves(grads), strict=True):
        rows = np.sum(np.abs(np.asarray(w, np.float64) * np.asarray(g, np.float64)), axis=-1)
        total += w.shape[-1] * np.sum(rows**2)
    return 2 * 6 * 2.0**-24 * np.sqrt(total)


@functools.partial(jax.jit, static_argnums=0)
def _logit_gradient(config, params, position, index):
    def logit(params):
        return model.forward(config, params, jnp.asarray([PROMPT]), jnp.float32)[0, position, index]

    return jax.grad(logit)(params)


@pytest.mark.parametrize(("family", "form"), CASES, ids=["-".join(case) for case in CASES])
def test_parity_with_mlx_lm(tmp_path, family, form):
    theirs = write_with_mlx_lm(tmp_path, family, form)
    config, params = load(tmp_path, dtype=jnp.float32)
    quantized = [leaf for leaf in jax.tree.leaves(params, is_leaf=jaxq.is_quantized) if jaxq.is_quantized(leaf)]
    assert bool(quantized) == (form != "dense")
    expected, tokens = their_logits_and_tokens(theirs)

    got = np.asarray(
        jax.jit(model.forward, static_argnums=(0, 3))(config, params, jnp.asarray([PROMPT]), jnp.float32)[0]
    )
    error = np.abs(got - expected)
    worst = np.unravel_index(np.argmax(error), error.shape)
    bound = logit_bound(config, params, *worst)
    assert error[worst] <= bound
    assert bound < 0.01 * np.std(expected), "the bound must be small enough to tell a wrong model"

    mine = generation.generate(config, params, PROMPT, max_tokens=STEPS, dtype=jnp.float32, at_once=STEPS)
    assert list(mine) == tokens


def test_config_from_written_file(tmp_path):
    write_with_mlx_lm(tmp_path, "llama", "mixed")
    raw = json.loads((tmp_path / "config.json").read_text())
    config = from_json(raw)
    assert (config.head_dim, config.rope_scaling.kind, config.num_kv_heads) == (32, "llama3", 2)
    with pytest.raises(ValueError, match="no 'rms_norm_eps'"):
        from_json({key: value for key, value in raw.items() if key != "rms_norm_eps"})
    assert Sampling().temperature == 0
