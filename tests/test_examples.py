"""The examples run from end to end, as a user would run them, on less work."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(script: str, *arguments: str) -> str:
    """What the example prints."""
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_digits(tmp_path):
    """Every format gets its row, of the size that its definition says, and the network has learned something."""
    plot = tmp_path / "digits.png"
    output = run("digits.py", "--epochs", "2", "--rounds", "1", "--plot", str(plot))
    table = re.findall(r"^(\w+) +([\d,]+) +([\d.]+)% +([\d.]+)%", output, re.MULTILINE)
    rows = {name: (int(size.replace(",", "")), float(error), float(right)) for name, size, error, right in table}
    weights, biases = 64 * 1024 + 1024 * 1024 + 1024 * 10, 4 * (1024 + 1024 + 10)
    for name, bits, group_bytes, group in [
        ("float32", 32, 0, 64),
        ("int8", 8, 8, 64),
        ("int4", 4, 8, 64),
        ("int3", 3, 8, 64),
        ("int2", 2, 8, 64),
        ("mxfp4", 4, 1, 32),
        ("nvfp4", 4, 1, 16),
    ]:
        assert rows[name][0] == weights * bits // 8 + weights // group * group_bytes + biases
    # One step of the grid is at most 2 / (2**bits - 1) of the largest weight. Rounding costs half a step; shifting the
    # grid so that the larger end of the range is a code exactly costs the other end less than a whole one.
    for name, bits in (("int8", 8), ("int4", 4), ("int3", 3), ("int2", 2)):
        assert 0 < rows[name][1] <= 200 / (2**bits - 1)
    assert rows["float32"][2] > 80 and rows["int8"][2] > 80
    assert plot.read_bytes().startswith(b"\x89PNG")


def packed_bytes(weights: int, bits: int) -> int:
    """Codes, and a float32 scale and bias for each 64."""
    return weights * bits // 8 + weights // 64 * 8


def test_equinox_mlp():
    output = run("equinox_mlp.py", "--width", "256", "--steps", "40", "--rounds", "1")
    rows = {
        name: (int(size.replace(",", "")), float(right), float(difference))
        for name, size, right, difference in re.findall(
            r"^(\w+) +([\d,]+) +([\d.]+)% +([\d.]+)% +[\d.]+$", output, re.MULTILINE
        )
    }
    weights, biases = 64 * 256 + 256 * 256 + 256 * 10, 4 * (256 + 256 + 10)
    assert rows["float32"][0] == 4 * weights + biases and rows["float32"][2] == 0
    for name, bits in (("int8", 8), ("int4", 4), ("int3", 3)):
        assert rows[name][0] == packed_bytes(weights, bits) + biases
    # Each bit less doubles the step of the grid, and so, roughly, the difference.
    assert 0 < rows["int8"][2] < rows["int4"][2] < rows["int3"][2]
    assert rows["float32"][1] > 80 and rows["int8"][1] > 80


def test_flax_transformer():
    output = run("flax_transformer.py", "--width", "64", "--depth", "1", "--steps", "20", "--rounds", "1")
    rows = {
        name: (int(size.replace(",", "")), float(loss))
        for name, size, loss in re.findall(r"^(\w+) +([\d,]+) +([\d.]+) +[\d.]+$", output, re.MULTILINE)
    }
    weights = 256 * 64 + 4 * 64 * 64 + 2 * 64 * 256
    # Position codes; the biases of query, key, value, out, up and down; three norms.
    rest = 4 * (64 * 64 + 4 * 64 + 256 + 64 + 3 * 64)
    assert rows["float32"][0] == 4 * weights + rest
    for name, bits in (("int8", 8), ("int4", 4)):
        assert rows[name][0] == packed_bytes(weights, bits) + rest
    # It has learned more than which bytes there are: a blind guess has log(256) = 5.545.
    assert rows["float32"][1] < 4 and rows["int8"][1] < 4 and rows["int4"][1] < 4


@pytest.mark.parametrize("names", [["adapters"], ["adapters", "scales", "biases"]], ids=["adapters", "everything"])
def test_qlora(names):
    output = run("qlora.py", "--hidden", "256", "--pretrain", "30", "--steps", "30", "--train", *names)
    rows = {
        name: [float(number.replace(",", "")) for number in re.findall(r"[\d.,]+", numbers)]
        for name, numbers in re.findall(r"^(dense LoRA|4-bit QLoRA) (.*)$", output, re.MULTILINE)
    }
    dense, quantized = rows["dense LoRA"], rows["4-bit QLoRA"]
    weights, biases = 64 * 256 + 2 * 256 * 256 + 256 * 10, 4 * (3 * 256 + 10)
    assert dense[0] == 4 * weights + biases and quantized[0] == packed_bytes(weights, 4) + biases
    # The same adapters; scales and biases come thrice, with Adam's two moments.
    assert quantized[1] == dense[1] + (0 if names == ["adapters"] else 3 * 8 * weights // 64)
    for row in (dense, quantized):
        *_, first_loss, last_loss, first_accuracy, last_accuracy = row
        assert last_loss < first_loss / 2 and last_accuracy > first_accuracy
