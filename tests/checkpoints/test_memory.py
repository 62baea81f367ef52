"""A load's memory: the arrays, and little beside them. Measured in a process of its own, from Linux's account of it."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="Linux's account of a process's memory")
@pytest.mark.parametrize("format", ["mlx", "gptq", "gguf:Q4_K"])
def test_a_load_takes_little_more_than_its_arrays(tmp_path, format):
    if format.startswith("gguf"):
        pytest.importorskip("gguf")
    command = [sys.executable, ROOT / "benchmarks" / "checkpoints.py", "--format", format, "--json"]
    command += ["--gigabytes", "0.3", "--repeats", "1", "--ways", "jaxq", "--directory", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=True)
    (measured,) = json.loads(done.stdout)["results"]
    assert measured["file_bytes"] > 2.9e8
    # The rest is what is repacked at a time, a few megabytes a thread.
    assert 1 <= measured["peak"] < 1.1
