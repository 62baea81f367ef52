"""The command line: every command, its JSON, its exit codes and its messages."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import checkpoints
from jaxq.checkpoints import mlx

typer_testing = pytest.importorskip("typer.testing")
from jaxq.cli import formats, grouping, machine  # noqa: E402
from jaxq.cli.app import app  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent


def run(*arguments, code=0):
    result = typer_testing.CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments, code=0):
    return json.loads(run(*arguments, "--json", code=code).stdout)


@pytest.fixture
def dense(tmp_path):
    """A dense directory with two matrices, an embedding, a norm, and a tokenizer beside them."""
    key = jax.random.key(0)
    tensors = {
        "model.embed_tokens.weight": jax.random.normal(key, (64, 128), jnp.bfloat16),
        "model.layers.0.mlp.up_proj.weight": jax.random.normal(key, (128, 128), jnp.bfloat16),
        "model.layers.0.mlp.down_proj.weight": jax.random.normal(key, (32, 128), jnp.bfloat16),
        "model.norm.weight": jnp.ones(128, jnp.bfloat16),
    }
    mlx.save(tmp_path / "dense", tensors, {"model_type": "qwen3"})
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    (tmp_path / "dense" / "modeling.py").write_text("raise SystemExit")
    return tmp_path / "dense"


def test_convert(dense, tmp_path):
    rules = ["--rule", r"down_proj=int8g32", "--rule", "embed=none"]
    report = run_json("convert", dense, tmp_path / "out", "--bits", 4, "--group-size", 64, *rules)
    assert report["format"] == "safetensors" and report["quantized"] == 2 and report["tensors"] == 4
    rows = {row["path"]: row for row in report["rows"]}
    up = rows["model.layers.0.mlp.up_proj.weight"]
    assert up["format"] == "int4g64" and 0.05 < up["relative_error"] < 0.2 and up["bits_per_weight"] == 4.5
    assert rows["model.norm.weight"]["note"] == "a vector"
    loaded = checkpoints.load(tmp_path / "out")
    source = checkpoints.load(dense)
    formats = {name: str(w.spec) for name, w in loaded.items() if jaxq.is_quantized(w)}
    assert formats == {
        "model.layers.0.mlp.up_proj.weight": "int4g64",
        "model.layers.0.mlp.down_proj.weight": "int8g32",
    }
    expected = jaxq.quantize(source["model.layers.0.mlp.up_proj.weight"], bits=4, group_size=64)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded["model.layers.0.mlp.up_proj.weight"], expected))
    assert np.array_equal(loaded["model.embed_tokens.weight"], source["model.embed_tokens.weight"])
    # The tokenizer goes along, code does not.
    beside = {path.name for path in (tmp_path / "out").iterdir()}
    assert beside == {"config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3"


def test_convert_prints_a_table(dense, tmp_path):
    result = run("convert", dense, tmp_path / "out", "--mode", "mxfp4")
    assert "3 of 4 tensors quantized" in result.stdout and "bits per weight" in result.stdout


def test_what_is_quantized_is_kept_unless_it_is_asked_otherwise(dense, tmp_path):
    run("convert", dense, tmp_path / "a", "--bits", 8, "--group-size", 32)
    kept = run_json("convert", tmp_path / "a", tmp_path / "b", "--bits", 4)
    assert {row["note"] for row in kept["rows"] if row["axis"]} == {"int8g32, kept exactly"}
    a, b = (checkpoints.load(tmp_path / name) for name in "ab")
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
    rules = ["--rule", "up_proj=none", "--rule", "down=3g32"]
    report = run_json("convert", tmp_path / "a", tmp_path / "c", "--bits", 4, "--requantize", *rules)
    rows = {row["path"].split(".")[-2]: (row["format"], row["note"]) for row in report["rows"]}
    assert rows["embed_tokens"] == ("int4g64", "from int8g32")
    assert rows["down_proj"] == ("int3g32", "from int8g32, by a rule")
    assert rows["up_proj"] == ("bfloat16", "from int8g32, by a rule")


def test_dtype(dense, tmp_path):
    run("convert", dense, tmp_path / "out", "--bits", 4, "--dtype", "float16")
    loaded = checkpoints.load(tmp_path / "out")
    assert {array.dtype for array in jax.tree.leaves(loaded)} == {np.dtype("uint32"), np.dtype("float16")}


def test_groups_of_16(tmp_path):
    qw = jaxq.quantize(jax.random.normal(jax.random.key(0), (64, 128)), bits=6, group_size=16)
    mlx.save(tmp_path / "a", {"w.weight": qw}, mlx_only=False)
    told = run("convert", tmp_path / "a", tmp_path / "b", code=1)
    assert "tensor 'w.weight' is int6g16" in told.stderr and "--groups-of-16 requantize" in told.stderr
    run("convert", tmp_path / "a", tmp_path / "b", "--groups-of-16", "requantize")
    assert str(checkpoints.load(tmp_path / "b")["w.weight"].spec) == "int8g32"
    run("convert", tmp_path / "a", tmp_path / "c", "--groups-of-16", "keep")
    assert jax.tree.all(jax.tree.map(np.array_equal, checkpoints.load(tmp_path / "c")["w.weight"], qw))


def test_a_nan_is_refused_by_name(tmp_path):
    mlx.save(tmp_path / "a", {"w.weight": jnp.full((64, 64), jnp.nan)})
    told = run("convert", tmp_path / "a", tmp_path / "b", "--bits", 4, code=1)
    assert "w.weight holds a NaN" in told.stderr
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["{dense}", "{out}", "--bits", "7"], 2, "bits=7 is not legal"),
        (["{dense}", "{out}", "--mode", "mxfp5"], 2, "mode='mxfp5'"),
        (["{dense}", "{out}", "--dtype", "int8"], 2, "dtype 'int8'"),
        (["{dense}", "{out}", "--scale-dtype", "int8"], 2, "dtype 'int8'"),
        (["{dense}", "{out}", "--requantize"], 2, "says to what"),
        (["{dense}", "{out}", "--groups-of-16", "x"], 2, "'x' is none of refuse, requantize, keep"),
        (["{dense}", "{dense}", "--bits", "4"], 1, "exists; pass --overwrite"),
        (["{dense}x", "{out}"], 1, "does not exist"),
        (["{dense}", "{dense}/config.json/x"], 1, "dense/config.json: File exists"),
        (["{dense}", "{out}", "--bits", "4", "--rule", "up_porj=8"], 1, "'up_porj' is found in no tensor's name"),
        (["{dense}", "{out}", "--rule", "x"], 2, "is no rule"),
        (["{dense}", "{out}", "--rule", "(=4"], 2, "is no regular expression"),
        (["{dense}", "{out}", "--rule", "x=4g5"], 2, "group_size=5 is not legal"),
        (["{dense}"], 2, "Missing argument"),
    ],
)
def test_wrong_uses_of_convert(dense, tmp_path, arguments, code, message):
    arguments = [argument.format(dense=dense, out=tmp_path / "out") for argument in arguments]
    told = run("convert", *arguments, code=code)
    # A wrong use comes in a box that breaks lines.
    assert message in " ".join(told.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_and_leaves_nothing(dense, tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    told = run("convert", dense, tmp_path / "out", "--bits", 4, code=1)
    assert told.stderr.startswith(f"error: {tmp_path}") and told.stderr.endswith(": No space left on device\n")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_errors_in_json(tmp_path):
    assert "does not exist" in run_json("inspect", tmp_path / "x", code=1)["error"]


def test_inspect(dense, tmp_path):
    run("convert", dense, tmp_path / "out", "--bits", 4, "--rule", "embed=none")
    found = run_json("inspect", tmp_path / "out")
    assert found["format"] == "mlx" and found["tensors"] == 4
    rows = {row["name"]: row for row in found["rows"]}
    down = rows["model.layers.0.mlp.down_proj.weight"]
    assert down == down | {"shape": [32, 128], "stored_as": "int4g64", "loads_as": "int4g64, scales bfloat16"}
    assert down["stored_bytes"] == down["loaded_bytes"] == 32 * 128 * 4.5 / 8
    assert found["stored_bytes"] == sum(row["stored_bytes"] for row in found["rows"])
    assert run_json("inspect", tmp_path / "out", "--select", "norm")["tensors"] == 1
    shown = run("inspect", tmp_path / "out").stdout
    assert "int4g64" in shown and all(name in shown for name in rows)  # whole, where no terminal bounds the lines
    assert "is found in no name" in run("inspect", dense, "--select", "x", code=1).stderr


def test_a_selection_that_is_no_expression(dense):
    assert "'(' is no regular expression" in run("inspect", dense, "--select", "(", code=1).stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_conversion_that_is_ended_leaves_no_target(tmp_path, end):
    """It is ended once a file aside shows that writing has begun. Only SIGKILL leaves that one."""
    if end == signal.SIGINT and signal.getsignal(end) == signal.SIG_IGN:
        pytest.skip("started in the background of a shell, which has programs ignore SIGINT")
    wide = {f"w{i}.weight": jnp.zeros((4096, 4096), jnp.float32) for i in range(8)}
    mlx.save(tmp_path / "dense", wide)
    command = [sys.executable, "-m", "jaxq", "convert", tmp_path / "dense", tmp_path / "out", "--bits", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not any(tmp_path.glob(".out.*/*")) and child.poll() is None and time.monotonic() < until:
            time.sleep(0.001)
        child.send_signal(end)
        code = child.wait(60)
    finally:
        child.kill()
    assert code == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[end]
    assert not (tmp_path / "out").exists()
    assert end == signal.SIGKILL or [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_doctor():
    found = run_json("doctor")
    assert found["versions"]["jax"] == jax.__version__ and found["implementations"] == jaxq.implementations()
    assert found["machine"]["backend"] == jax.default_backend() and found["cpu kernels"]
    assert jax.__version__ in run("doctor").stdout


def test_bench():
    found = run_json(
        "bench", "--shape", "64x128", "--batch", 2, "--format", "mxfp4", "--implementation", "xla", "--repeats", 2
    )
    assert [(row["weight"], row["implementation"], row["batch"]) for row in found["rows"]] == [
        ("float32", "jax", 2),
        ("bfloat16", "jax", 2),
        ("mxfp4", "xla", 2),
    ]
    for row in found["rows"]:
        assert row["microseconds"] > 0 and row["gigabytes_per_second"] > 0
    assert found["rows"][1]["speedup_over_bfloat16"] == 1
    assert "is no shape" in run("bench", "--shape", "64", code=2).stderr
    assert "implementation" in run("bench", "--shape", "64x128", "--implementation", "x", code=1).stderr


def test_bench_prints_a_table():
    shown = run(
        "bench", "--shape", "64x128", "--batch", 1, "--format", "8g64", "--implementation", "xla", "--repeats", 1
    )
    assert "int8g64" in shown.stdout


@pytest.mark.parametrize(
    "text, spec",
    [
        ("int4g64", "int4g64"),
        ("3g32", "int3g32"),
        ("8", "int8g64"),
        ("mxfp8", "mxfp8"),
        ("nvfp4", "nvfp4"),
        ("none", "None"),
    ],
)
def test_formats(text, spec):
    assert str(formats.parse_spec(text)) == spec
    assert str(formats.parse_rule(f"a=b.*={text}")) == str(("a=b.*", formats.parse_spec(text)))


def test_flat():
    assert list(machine.flat({"a": {"b": None, "c": [1, 2]}})) == [("a: b", "not installed"), ("a: c", "1, 2")]


def test_as_a_program():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jaxq", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == f"jaxq {jaxq.__version__}\n"


def test_without_its_extra():
    script = "import sys; sys.modules['typer'] = None; from jaxq.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "pip install 'jaxq[cli]'" in done.stderr


def test_names_in_groups():
    names = ["embed", *(f"h.{i}.w{j}" for i in (0, 1, 2, 5) for j in (1, 2)), "h.3.w1", "h.03.w1", "Dense_0/k"]
    formats = {"h.5.w2": "other"}
    found = grouping.group(names, [formats.get(name, "same") for name in names])
    shown = [(pattern, [names[i] for i in indices]) for pattern, indices in found]
    assert shown == [
        ("embed", ["embed"]),
        ("h.{0-3,5}.w1", ["h.0.w1", "h.1.w1", "h.2.w1", "h.5.w1", "h.3.w1"]),
        ("h.{0-2}.w2", ["h.0.w2", "h.1.w2", "h.2.w2"]),
        ("h.5.w2", ["h.5.w2"]),
        ("h.03.w1", ["h.03.w1"]),
        ("Dense_0/k", ["Dense_0/k"]),
    ]


def test_a_pattern_stands_for_no_other_names():
    """Of two numbers, all pairs: layer 1 has no expert 3, so that it stands alone."""
    pairs = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]
    found = grouping.group([f"l.{i}.e.{j}" for i, j in pairs], [None] * len(pairs))
    assert found == [("l.{0-1}.e.{0-2}", [0, 1, 2, 4, 5, 6]), ("l.0.e.3", [3])]
    assert grouping.group([], []) == []


def test_tables_have_a_row_for_like_layers(tmp_path):
    """JSON, and tables with --all, have a row for each."""
    key = jax.random.key(0)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)]
    tensors = {name: jax.random.normal(jax.random.fold_in(key, i), (64, 64)) for i, name in enumerate(names)}
    mlx.save(tmp_path / "dense", tensors)
    convert = ["convert", tmp_path / "dense", "--bits", 4, "--rule", r"layers\.3\.=8"]
    told = run(*convert[:2], tmp_path / "a", *convert[2:]).stdout
    (row,) = [line for line in told.splitlines() if "{0-2}" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    size = 64 * 64 * 5 // 8  # 4 bits, and two float32 per 64 weights
    low, high = sorted(r["relative_error"] for r in run_json(*convert[:2], tmp_path / "b", *convert[2:])["rows"][:3])[
        ::2
    ]
    error = f"{low:.4f} to {high:.4f}"
    assert cells == [
        "model.layers.{0-2}.mlp.up_proj.weight",
        "3",
        "64x64",
        "int4g64",
        f"{3 * size:,}",
        "5.00",
        error,
        "",
    ]
    assert names[3] in told and names[0] not in told
    everything = run(*convert[:2], tmp_path / "c", *convert[2:], "--all").stdout
    assert all(name in everything for name in names) and "{" not in everything
    told = run("inspect", tmp_path / "a").stdout
    assert "model.layers.{0-2}.mlp.up_proj.weight" in told and f"{3 * size:,}" in told and names[0] not in told
    assert all(name in run("inspect", tmp_path / "a", "--all").stdout for name in names)
    assert [row["name"] for row in run_json("inspect", tmp_path / "a")["rows"]] == names
