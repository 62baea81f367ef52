"""The benchmarks run; what they measure is for people to read."""

import json
import os
import pathlib
import runpy
import sys
import types

import pytest

import jaxq
from jaxq import kernels
from jaxq.kernels import repack

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


def test_quantized_matmul(monkeypatch, capsys):
    arguments = ["--size", "32", "64", "--rows", "1", "3", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["quantized_matmul.py", *arguments])
    runpy.run_path(str(FOLDER / "quantized_matmul.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "M=1, 2 rounds" in out and "M=3, 2 rounds" in out
    usable = [name for name, state in jaxq.implementations()["cpu"].items() if state in ("default", "usable")]
    for name in ("JAX dense float32", "JAX dense bfloat16", *usable):
        assert out.count(f"\n{name:20} ") == 2
    if "mlx" in usable:
        assert out.count("mlx, resident / mlx.core:") == 2


def test_an_illegal_format_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quantized_matmul.py", "--bits", "7"])
    with pytest.raises(ValueError, match="QuantSpec: bits=7 is not legal"):
        runpy.run_path(str(FOLDER / "quantized_matmul.py"), run_name="__main__")


def test_checkpoints(monkeypatch, capsys):
    arguments = ["--gigabytes", "0.001", "--repeats", "1", "--format", "gguf:Q4_K", "--ways", "read", "jaxq", "--json"]
    monkeypatch.setattr(sys, "argv", ["checkpoints.py", *arguments])
    runpy.run_path(str(FOLDER / "checkpoints.py"), run_name="__main__")
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["format"] == "gguf:Q4_K" and set(result["seconds"]) == {"read", "jaxq"}
    # 4.5 bits in the file; 4 bits and two float32 per 32 weights in the arrays.
    assert result["array_bytes"] == pytest.approx(result["file_bytes"] * 6 / 4.5, rel=0.01)


def test_checkpoints_tell_of_a_library_that_is_missing_or_stale(monkeypatch, tmp_path):
    library_warning = runpy.run_path(str(FOLDER / "checkpoints.py"))["library_warning"]
    monkeypatch.setattr(repack, "why_unavailable", lambda: "it was not built")
    assert library_warning() == "NumPy repacks, several times slower: it was not built"
    monkeypatch.setattr(repack, "why_unavailable", lambda: None)
    library = tmp_path / "libjaxq_cpu.so"
    library.touch()
    monkeypatch.setattr(kernels, "cpu_library", lambda: types.SimpleNamespace(_name=str(library)))
    assert library_warning() is None
    os.utime(library, (0, 0))
    assert "libjaxq_cpu.so is older than" in library_warning()
