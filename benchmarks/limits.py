"""What this machine can do at most, from limits.cc, which is compiled for it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path


class Limits:
    """The compiled program; ask `available` first."""

    def __init__(self) -> None:
        compiler = shutil.which("c++")
        self.available = compiler is not None
        if compiler is None:
            return
        self._directory = tempfile.TemporaryDirectory()
        self._program = str(Path(self._directory.name) / "limits")
        flags = ["-O3", "-march=native", "-std=c++17", "-pthread"]
        source = str(Path(__file__).with_name("limits.cc"))
        subprocess.run([compiler, *flags, source, "-o", self._program], check=True)

    def measure(self, threads: int, mebibytes: int) -> tuple[float, float]:
        """Bytes read per second, over and over from so many mebibytes, and float32 operations per second."""
        command = [self._program, str(threads), str(mebibytes)]
        read, flops = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        return float(read), float(flops)
