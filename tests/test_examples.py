"""The examples run from end to end, as a user would run them, on less work."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def test_digits(tmp_path):
    """Every format gets its row, of the size that its definition says, and the network has learned something."""
    plot = tmp_path / "digits.png"
    command = [sys.executable, str(EXAMPLES / "digits.py"), "--epochs", "2", "--rounds", "1", "--plot", str(plot)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    table = re.findall(r"^(\w+) +([\d,]+) +([\d.]+)% +([\d.]+)%", result.stdout, re.MULTILINE)
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
