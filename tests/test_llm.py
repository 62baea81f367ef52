"""The language model by itself: caches, padding, stacking, names, sampling, tokenizers."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from examples.llm import corpus, generation, model, rope, tokenizer
from examples.llm.config import Config, RopeScaling, from_gguf, from_json
from examples.llm.load import build, load, quantize_with
from examples.llm.sampling import Sampling, choose, nucleus

CONFIG = Config(
    family="llama",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    eos_ids=(),
)
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PARTS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def random_tensors(config, seed=0):
    """Dense weights by Hugging Face's names."""
    rng = np.random.default_rng(seed)
    hidden, inner = config.hidden_size, config.intermediate_size
    sizes = [(config.q_size, hidden), (config.kv_size, hidden), (config.kv_size, hidden), (hidden, config.q_size)]
    sizes += [(inner, hidden), (inner, hidden), (hidden, inner)]

    def matrix(rows, columns):
        return (rng.normal(size=(rows, columns)) * columns**-0.5).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(config.vocab_size, hidden)}
    tensors |= {"lm_head.weight": matrix(config.vocab_size, hidden), "model.norm.weight": np.ones(hidden, np.float32)}
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        tensors |= {f"{layer}.{part}.weight": matrix(*size) for part, size in zip(PARTS, sizes, strict=True)}
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"{layer}.{norm}.weight": 1 + 0.1 * rng.normal(size=hidden).astype(np.float32) for norm in norms}
    return tensors


@pytest.fixture(scope="module")
def dense():
    return build(CONFIG, random_tensors(CONFIG), dtype=jnp.float32)


def close(got, expected):
    """Two orders of one float32 computation. Every logit is a sum of at most 64 products behind two layers of sums of
    at most 128; with norms between them each layer passes on relative errors of its input about unchanged, so
    2 * (2 * 128 + 64) * 2**-24 of the logits' scale bounds the difference."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=640 * 2.0**-24 * float(np.abs(np.asarray(expected)).max()))


@pytest.mark.parametrize("length", [1, 63, 64, 70])
def test_prefill_gives_the_logits_of_a_run_without_cache(dense, length, monkeypatch):
    monkeypatch.setattr(generation, "PIECE", 64)
    prompt = np.random.default_rng(1).integers(0, 96, (2, length))
    cache = model.init_cache(CONFIG, dense, batch=2, length=128, dtype=jnp.float32)
    logits, _ = generation.prefill(CONFIG, dense, prompt, cache)
    close(logits, model.forward(CONFIG, dense, jnp.asarray(prompt), jnp.float32)[:, -1])


def test_prefill_refuses_what_the_cache_cannot_hold(dense):
    cache = model.init_cache(CONFIG, dense, batch=1, length=64, dtype=jnp.float32)
    with pytest.raises(ValueError, match="needs a cache of 128"):
        generation.prefill(CONFIG, dense, np.zeros((1, 65), int), cache)


def test_decode_gives_the_tokens_of_runs_without_cache(dense):
    got = list(generation.generate(CONFIG, dense, [1, 2, 3], max_tokens=9, dtype=jnp.float32, at_once=4))
    logits = model.forward(CONFIG, dense, jnp.asarray([[1, 2, 3, *got]]), jnp.float32)[0]
    assert got == jnp.argmax(logits, axis=-1)[2:-1].tolist()


def test_bursts_do_not_change_what_is_drawn(dense):
    def draw(at_once):
        return list(
            generation.generate(
                CONFIG,
                dense,
                [5],
                max_tokens=7,
                sampling=Sampling(1.0, 0.9),
                seed=3,
                dtype=jnp.float32,
                at_once=at_once,
            )
        )

    assert draw(1) == draw(4)


def test_generation_stops_at_the_end_token(dense):
    first = list(generation.generate(CONFIG, dense, [1, 2, 3], max_tokens=6, dtype=jnp.float32))
    config = dataclasses.replace(CONFIG, eos_ids=(first[3],))
    stopped = list(generation.generate(config, dense, [1, 2, 3], max_tokens=6, dtype=jnp.float32))
    assert stopped == first[: first.index(first[3])]


@pytest.mark.parametrize("quantizer", [None, quantize_with(4, 32)], ids=["dense", "int4g32"])
def test_stacked_and_separate_layers_agree(quantizer):
    params = build(CONFIG, random_tensors(CONFIG), dtype=jnp.float32, quantizer=quantizer)
    (stack,) = params["segments"]
    apart = params | {"segments": tuple(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], stack) for i in range(2))}
    tokens = jnp.arange(12)[None]
    close(*(model.forward(CONFIG, params, tokens, jnp.float32) for params in (params, apart)))


def test_layers_of_one_format_are_one_stack_and_others_stand_apart():
    """In the order of the file: runs of 1, 2 and 1 layers, the second and third in 8 bits."""
    config = dataclasses.replace(CONFIG, num_layers=4)
    tensors = random_tensors(config)

    def quantizer(name, weight):
        return jaxq.quantize(weight, bits=8 if re.search("layers.[12].mlp.down", name) else 4, group_size=32)

    params = build(config, tensors, dtype=jnp.float32, quantizer=quantizer)
    assert [segment["attention_norm"].shape[0] for segment in params["segments"]] == [1, 2, 1]
    at = 0
    for segment in params["segments"]:
        for i in range(len(segment["attention_norm"])):
            names = [f"model.layers.{at}.{part}.weight" for part in PARTS]
            qkv = np.concatenate([tensors[name] for name in names[:3]])
            for got, name, wanted in (
                (segment["qkv"][0], names[0], qkv),
                (segment["down"], names[6], tensors[names[6]]),
            ):
                expected = quantizer(name, jnp.asarray(wanted))
                jax.tree.map(np.testing.assert_array_equal, got[i], expected)
            at += 1
    assert at == 4


def test_build_names_what_is_missing_or_misshapen():
    tensors = random_tensors(CONFIG)
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=f"no tensor '{name}'"):
        build(CONFIG, {key: value for key, value in tensors.items() if key != name}, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"down_proj.weight' has shape \(64, 64\)"):
        build(CONFIG, tensors | {name: tensors[name][:, :64]}, dtype=jnp.float32)


GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def as_gguf(tensors, config):
    """As llama.cpp's converter names and permutes them: it interleaves the halves of each head of q and k."""
    out = {"token_embd.weight": tensors["model.embed_tokens.weight"], "output.weight": tensors["lm_head.weight"]}
    out["output_norm.weight"] = tensors["model.norm.weight"]
    for name, value in tensors.items():
        if not name.startswith("model.layers"):
            continue
        _, _, layer, part, _ = name.replace("self_attn.", "self_attn/").replace("mlp.", "mlp/").split(".")
        part = part.replace("/", ".")
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_heads if "q_proj" in part else config.num_kv_heads
            value = value.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(value.shape)
        out[f"blk.{layer}.{GGUF[part]}.weight"] = value
    return out


def test_gguf_names_and_order_give_the_same_parameters():
    tensors = random_tensors(CONFIG)
    for quantizer in (None, quantize_with(4, 32)):
        ours = build(CONFIG, tensors, dtype=jnp.float32, quantizer=quantizer)
        theirs = build(CONFIG, as_gguf(tensors, CONFIG), dtype=jnp.float32, quantizer=quantizer)
        for got, expected in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_gguf_file_gives_the_logits_of_its_dequantized_weights(tmp_path):
    """Written and dequantized by the gguf package; rotary factors are in the file, as newer converters put them."""
    gguf = pytest.importorskip("gguf")
    tensors = random_tensors(CONFIG)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(CONFIG.num_layers)
    writer.add_context_length(CONFIG.max_position)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_heads)
    writer.add_head_count_kv(CONFIG.num_kv_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_vocab_size(CONFIG.vocab_size)
    factors = np.linspace(1, 3, CONFIG.head_dim // 2, dtype=np.float32)
    writer.add_tensor("rope_freqs.weight", factors)
    q4 = gguf.GGMLQuantizationType.Q4_0
    for name, value in as_gguf(tensors, CONFIG).items():
        if value.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(value, q4), raw_dtype=q4)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    config, params = load(path, dtype=jnp.float32)
    assert jaxq.is_quantized(params["embed"])
    scaling = RopeScaling("factors", factors=tuple(factors.tolist()))
    # The file holds the epsilon in float32.
    epsilon = float(np.float32(CONFIG.rms_norm_eps))
    assert config == dataclasses.replace(CONFIG, rope_scaling=scaling, rms_norm_eps=epsilon)
    rounded = {
        name: gguf.quants.dequantize(gguf.quants.quantize(value, q4), q4) if value.ndim == 2 else value
        for name, value in tensors.items()
    }
    expected = build(config, rounded, dtype=jnp.float32)
    tokens = jnp.arange(12)[None]
    close(model.forward(config, params, tokens, jnp.float32), model.forward(config, expected, tokens, jnp.float32))


def test_config_from_gguf_is_that_of_the_json():
    raw = {
        "model_type": "qwen3",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "eos_token_id": 7,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }
    metadata = {
        "general.architecture": "qwen3",
        "qwen3.vocab_size": 96,
        "qwen3.embedding_length": 64,
        "qwen3.feed_forward_length": 128,
        "qwen3.block_count": 2,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32,
        "qwen3.context_length": 512,
        "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen3.rope.freq_base": 1e6,
        "qwen3.rope.scaling.type": "linear",
        "qwen3.rope.scaling.factor": 2.0,
        "tokenizer.ggml.eos_token_id": 7,
    }
    assert from_gguf(metadata, tied=False) == from_json(raw)
    with pytest.raises(ValueError, match=r"no 'qwen3\.block_count'"):
        from_gguf({k: v for k, v in metadata.items() if "block" not in k}, tied=False)
    with pytest.raises(ValueError, match="'mamba' is not supported"):
        from_gguf({"general.architecture": "mamba"}, tied=False)
    with pytest.raises(ValueError, match="family='gpt2'"):
        from_json(raw | {"model_type": "gpt2"})
    with pytest.raises(ValueError, match="use_sliding_window"):
        from_json(raw | {"use_sliding_window": True, "sliding_window": 64})


def test_frequency_factors_divide():
    plain = dataclasses.replace(CONFIG, rope_theta=500.0)
    scaled = dataclasses.replace(plain, rope_scaling=RopeScaling("factors", factors=(1.0, 2.0, 3.0, 4.0) * 2))
    base = 500.0 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_array_equal(rope.frequencies(plain)[0], base.astype(np.float32))
    np.testing.assert_array_equal(rope.frequencies(scaled)[0], (base / ([1, 2, 3, 4] * 2)).astype(np.float32))


# ---- sampling


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_nucleus_is_the_smallest_set_with_the_mass(top_p):
    probabilities = np.random.default_rng(2).dirichlet(np.full(300, 0.2), size=4).astype(np.float32)
    threshold = np.asarray(nucleus(jnp.asarray(probabilities), top_p))
    for row, cut in zip(probabilities.astype(np.float64), threshold[:, 0], strict=True):
        order = np.sort(row)[::-1]
        smallest = 1 + int(np.argmax(np.cumsum(order) >= top_p * row.sum()))
        assert abs(int((row >= cut).sum()) - smallest) <= 1  # one token of rounding in the float32 sums


@pytest.mark.parametrize("size", [3, 33, 96, 256, 1280])
def test_likeliest_is_the_first_of_the_largest(size):
    logits = np.random.default_rng(4).integers(0, size // 7 + 2, (50, size)).astype(np.float32)
    np.testing.assert_array_equal(choose(jnp.asarray(logits), Sampling(), jax.random.key(0)), logits.argmax(-1))
    logits[:, size // 2] = np.nan
    chosen = np.asarray(choose(jnp.asarray(logits), Sampling(), jax.random.key(0)))
    assert ((chosen >= 0) & (chosen < size)).all()


def test_top_p_draws_from_the_nucleus_alone():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = jax.vmap(lambda key: choose(logits, Sampling(1.0, 0.7), key))(keys)
    counts = np.bincount(np.asarray(drawn)[:, 0], minlength=4)
    assert counts[2] == counts[3] == 0
    # 0.5 / 0.8 of 2000 draws, five standard deviations of a binomial.
    assert abs(counts[0] - 1250) < 5 * np.sqrt(2000 * 0.625 * 0.375)


def test_sampling_refuses_nonsense():
    with pytest.raises(ValueError, match="temperature=-1"):
        Sampling(-1)
    with pytest.raises(ValueError, match="top_p=0"):
        Sampling(1.0, 0)


# ---- tokenizers


def test_bytes_stream_whole_characters():
    words = tokenizer.Bytes()
    ids = words.encode("aé€")
    assert ids == [corpus.BEGIN, *"aé€".encode()]
    assert list(words.stream(ids)) == ["a", "é", "€"]


def test_gguf_vocabulary_cuts_and_merges_like_the_same_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    lib = tokenizers.Tokenizer(tokenizers.models.BPE())
    lib.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<s>"],
    )
    lib.train_from_iterator(["def f(x):\n    return x + 1\n"] * 9 + ["the theory of the thing"] * 9, trainer)
    spec = json.loads(lib.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    words = tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in spec["merges"]],
            "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.bos_token_id": 0,
        }
    )
    text = "the theory of f(x) naïve €"
    assert words.encode(text) == [0, *lib.encode(text).ids]
    assert "".join(words.stream(words.encode(text))) == text
    with pytest.raises(ValueError, match="vocabulary 'llama'"):
        tokenizer.from_gguf({"tokenizer.ggml.model": "llama"})
    contradicting = {"model": "gpt2", "pre": "qwen2", "tokens": ["t0", "t1"], "merges": ["t 0"]}
    with pytest.raises(ValueError, match=r"the file's vocabulary can't be used: .*`t`"):
        tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in contradicting.items()})
