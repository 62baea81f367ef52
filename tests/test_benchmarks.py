"""The benchmarks run; what they measure is for people to read."""

import pathlib
import runpy
import sys

import pytest

import jaxq

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
