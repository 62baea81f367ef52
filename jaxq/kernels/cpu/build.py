"""Build the CPU kernels in place, with the CMake file that a wheel is built with: `python -m jaxq.kernels.cpu.build`.

For a checkout that is not installed. The library goes next to this file, where `jaxq.kernels` looks for it.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

SOURCE = pathlib.Path(__file__).parent


def library_name() -> str:
    """The file name of the shared library on this platform."""
    return "libjaxq_cpu.dylib" if sys.platform == "darwin" else "libjaxq_cpu.so"


def build(output: pathlib.Path, build_directory: pathlib.Path, sanitize: str = "") -> pathlib.Path:
    """Configure and compile in `build_directory`; the finished library replaces `output`'s in one step.

    Args:
      output: the directory that gets the library.
      build_directory: where CMake works; kept, so that a second build compiles only what changed.
      sanitize: passed to `-fsanitize=` (`address,undefined` or `thread`); empty for a normal build.

    Raises:
      subprocess.CalledProcessError: CMake or the compiler failed; their output says why.
    """
    configure = ["cmake", "-S", str(SOURCE), "-B", str(build_directory), f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DJAXQ_SANITIZE={sanitize}"]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", str(build_directory), "--parallel", str(os.cpu_count() or 1)], check=True)
    output.mkdir(parents=True, exist_ok=True)
    target = output / library_name()
    aside = target.with_suffix(".tmp")
    shutil.copy2(build_directory / library_name(), aside)
    os.replace(aside, target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=SOURCE, help="directory for the library")
    parser.add_argument("--build-directory", type=pathlib.Path, help="where CMake works (default: a temporary one)")
    parser.add_argument("--sanitize", default="", help="sanitizers, as in -fsanitize=")
    args = parser.parse_args()
    if args.build_directory:
        print(build(args.output, args.build_directory, args.sanitize))
        return
    with tempfile.TemporaryDirectory() as directory:
        print(build(args.output, pathlib.Path(directory), args.sanitize))


if __name__ == "__main__":
    main()
