"""The reader is told by what stands at the path."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import checkpoints, progress
from jaxq.checkpoints import CheckpointError, mlx


def test_mlx_and_dense(tmp_path):
    qw = jaxq.quantize(jnp.ones((4, 64)), bits=4)
    mlx.save(tmp_path / "m", {"a.weight": qw}, {"model_type": "x"})
    assert checkpoints.open(tmp_path / "m").format == "mlx"
    assert jaxq.is_quantized(checkpoints.load(tmp_path / "m")["a.weight"])
    mlx.save(tmp_path / "n", {"a.weight": np.ones(3, np.float32)}, {"model_type": "x"})
    checkpoint = checkpoints.open(tmp_path / "n")
    assert checkpoint.format == "safetensors" and checkpoint.config["model_type"] == "x"
    assert checkpoints.load(tmp_path / "n" / "model.safetensors")["a.weight"].shape == (3,)


def test_a_saved_tree_opens_by_its_paths(tmp_path):
    qw = jaxq.quantize(jnp.ones((4, 64)), bits=4, axis=-1)
    jaxq.save(tmp_path / "x.safetensors", {"params": [qw, np.ones(3, np.float32)], "steps": 7})
    checkpoint = checkpoints.open(tmp_path / "x.safetensors")
    assert checkpoint.format == "jaxq" and list(checkpoint) == ["params.0", "params.1"]
    assert checkpoint.entries["params.0"].kind == "int4g64"
    assert jax.tree.all(jax.tree.map(np.array_equal, checkpoint["params.0"], qw))
    with pytest.raises(ValueError, match=r"'params.0' is not named `\*.weight`"):
        checkpoints.convert(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("method", [{"quant_method": "bitsandbytes"}, {"bits": 4}, 3])
def test_an_unknown_method_is_refused(tmp_path, method):
    mlx.save(tmp_path / "n", {"a.weight": np.ones(3, np.float32)})
    (tmp_path / "n" / "config.json").write_text(json.dumps({"quantization_config": method}))
    with pytest.raises(CheckpointError, match="quantization"):
        checkpoints.open(tmp_path / "n")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoints.open(tmp_path / "x")


@pytest.mark.parametrize("package", ["tqdm", "rich"])
def test_progress(tmp_path, monkeypatch, capsys, package):
    pytest.importorskip(package)
    mlx.save(tmp_path / "m", {"a.weight": np.ones((64, 64), np.float32), "b": np.ones(5, np.float32)})
    monkeypatch.setattr(progress, "_PACKAGES", (package,))
    assert set(checkpoints.load(tmp_path / "m", progress=True)) == {"a.weight", "b"}
    shown = capsys.readouterr()
    assert not shown.out and "loading" in shown.err and "16.4" in shown.err  # kB of 16404
    # Unasked, only for what takes long, and for somebody who sees it.
    checkpoints.load(tmp_path / "m")
    monkeypatch.setattr(progress, "_SHOWN_BYTES", 0)
    checkpoints.load(tmp_path / "m")
    assert not capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    checkpoints.load(tmp_path / "m")
    assert "loading" in capsys.readouterr().err
    monkeypatch.setattr(progress, "_PACKAGES", ("no_such_package",))
    checkpoints.load(tmp_path / "m")
    with pytest.raises(ImportError, match=r"load: progress=True needs .* jaxq\[progress\]"):
        checkpoints.load(tmp_path / "m", progress=True)
