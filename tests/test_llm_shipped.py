"""The model that ships with the example, its training, its commands and the demo."""

import json
import lzma
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from examples.llm import __main__ as cli
from examples.llm import corpus, demo, generation, train
from examples.llm.load import load, quantize_with


@pytest.fixture(scope="module")
def shipped():
    return load(demo.SHIPPED, dtype=jnp.bfloat16)


def bits_per_byte(config, params):
    windows = corpus.windows(count=8, length=512)
    return generation.cross_entropy(config, params, windows, dtype=jnp.bfloat16) / math.log(2)


def test_model_is_small_and_every_format_fits_it(shipped):
    assert (demo.SHIPPED / "model.safetensors").stat().st_size < 8e6
    config, params = shipped
    matrices = [leaf for leaf in jax.tree.leaves(params) if leaf.shape[-1] > config.head_dim and leaf.ndim > 1]
    assert 2e6 < sum(leaf.size for leaf in matrices) < 8e6
    assert all(leaf.shape[-1] % 128 == 0 for leaf in matrices)


def test_model_predicts_files_it_has_not_seen(shipped):
    """Better than a compressor that sees all these files at once, from 512 bytes; and 4 bits cost little of it."""
    config, params = shipped
    dense = bits_per_byte(config, params)
    text = bytes(corpus.stream(held_out=True)[1:].astype(np.uint8).tolist())
    assert dense < 8 * len(lzma.compress(text)) / len(text)
    config, quantized = load(demo.SHIPPED, dtype=jnp.bfloat16, quantizer=quantize_with(4, 64))
    assert jaxq.is_quantized(quantized["embed"])
    assert dense - 0.01 < bits_per_byte(config, quantized) < dense + 0.05


def test_held_out_files_do_not_depend_on_the_machine(tmp_path):
    names = ["copy.py", "os.py", "test/test_os.py", "email/message.py", "encodings/cp037.py"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    assert corpus.files(tmp_path) == ["copy.py", "email/message.py", "os.py"]
    assert [name for name in corpus.files(tmp_path) if corpus.is_held_out(name)] == ["copy.py"]
    held = corpus.stream(held_out=True, root=tmp_path)
    assert held.tolist() == [corpus.BEGIN, *b"# copy.py\n"]


# ---- training


def small_run(tmp_path, name, *extra):
    """Eight steps of a tiny model on a little text: its tensors."""
    root = tmp_path / "lib"
    root.mkdir(exist_ok=True)
    (root / "copy.py").write_text("def copy(x):\n    return x\n" * 40)
    (root / "os.py").write_text("import sys\nfor name in sys.path:\n    print(name)\n" * 40)
    size = "--hidden 128 --intermediate 128 --layers 1 --length 16 --batch 4 --steps 8 --chunk 4 --warmup 2"
    out = tmp_path / name
    train.main([*size.split(), "--root", str(root), "--out", str(out), *extra])
    return train.load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path, capsys):
    straight, config = small_run(tmp_path, "straight")
    state = ["--state", str(tmp_path / "state.safetensors")]
    small_run(tmp_path, "resumed", *state, "--stop", "4")
    resumed, _ = small_run(tmp_path, "resumed", *state)
    assert config["tokenizer"] == "bytes"
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    first, last = (float(line.split()[2]) for line in printed[:2])
    assert last < first


# ---- commands


def test_generate_continues_the_prompt(capsys):
    assert cli.main(["generate", "pystdlib", "--prompt", "import ", "--max-tokens", "12"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("import ") and len(out) > len("import ") + 6


def test_perplexity_of_a_text(tmp_path, capsys):
    text = tmp_path / "text.py"
    text.write_text("import os\n\n\ndef main():\n    return os.path.join('a', 'b')\n" * 4)
    args = ["perplexity", "pystdlib", str(text), "--window", "64", "--bits", "8"]
    assert cli.main(args) == 0
    bits = float(capsys.readouterr().out.split(" per token, ")[1].split()[0])
    assert 0 < bits < 4


def test_bench_prints_speed_and_memory(capsys):
    args = ["bench", "pystdlib", "--prompt-tokens", "32", "--steps", "4", "--repeats", "1"]
    assert cli.main(args) == 0
    lines = {line.split()[0]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines()}
    assert all(lines[name] > 0 for name in ("prefill", "decode", "weights", "cache"))


def test_errors_are_told_in_a_line(tmp_path, capsys):
    assert cli.main(["generate", str(tmp_path / "none")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_demo_tabulates_formats_and_plots_them(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    formats = {name: demo.FORMATS[name] for name in ("dense f32", "dense bf16", "4 bits")}
    monkeypatch.setattr(demo, "FORMATS", formats)
    monkeypatch.setattr(demo, "STEPS", 8)
    plot = tmp_path / "quality.png"
    demo.main(["--plot", str(plot), "--windows", "8"])
    out = capsys.readouterr().out
    assert plot.stat().st_size > 0
    rows = {line[:12].strip(): line.split() for line in out.splitlines() if line[:12].strip() in formats}
    assert list(rows) == list(formats)
    assert demo.PROMPT in out
