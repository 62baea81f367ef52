"""How it runs: compiled kernels, found and opened here. Each library is opened once, when it is first asked for."""

from __future__ import annotations

import ctypes
import functools
import pathlib
import sys

CPU_HANDLERS = (
    "jaxq_quantized_matmul_cpu",
    "jaxq_dequantize_cpu",
    "jaxq_quantize_cpu",
    "jaxq_cached_attention_cpu",
    "jaxq_empty_cpu",
)


class KernelsUnavailable(RuntimeError):
    """A compiled library is not there or cannot be used; the message says why and what would help."""


def load_cpu_library(path: pathlib.Path) -> ctypes.CDLL:
    """Open the CPU kernels' library at `path` and declare its functions.

    Raises:
      KernelsUnavailable: it cannot be opened, or lacks one of our functions.
    """
    try:
        library = ctypes.CDLL(str(path))
        for name in CPU_HANDLERS:
            getattr(library, name)
        for name, result in (("name", ctypes.c_char_p), ("missing", ctypes.c_char_p), ("calls", ctypes.c_uint64)):
            function = getattr(library, f"jaxq_cpu_isa_{name}")
            function.argtypes, function.restype = [ctypes.c_int], result
    except (OSError, AttributeError) as error:
        raise KernelsUnavailable(
            f"the CPU kernels at {path} cannot be used ({error}); build them anew: python -m jaxq.kernels.cpu.build"
        ) from error
    return library


@functools.cache
def _cpu_library_or_reason() -> ctypes.CDLL | str:
    from jaxq.kernels import cpu

    name = "libjaxq_cpu.dylib" if sys.platform == "darwin" else "libjaxq_cpu.so"
    # An editable install keeps the library in another directory than the sources: the package has both.
    for directory in cpu.__path__:
        path = pathlib.Path(directory) / name
        if path.exists():
            try:
                return load_cpu_library(path)
            except KernelsUnavailable as error:
                return str(error)
    return (
        "the CPU kernels were not built when jaxq was installed (that needs a C++17 compiler and CMake); "
        "build them with: python -m jaxq.kernels.cpu.build"
    )


def cpu_library() -> ctypes.CDLL:
    """The CPU kernels' library.

    Raises:
      KernelsUnavailable: it was not built, or cannot be opened.
    """
    found = _cpu_library_or_reason()
    if isinstance(found, str):
        raise KernelsUnavailable(found)
    return found


def isas(library: ctypes.CDLL) -> dict[str, str | None]:
    """Every instruction set in the library, best first, with what this CPU lacks for it, or None where it can run."""
    found: dict[str, str | None] = {}
    while (name := library.jaxq_cpu_isa_name(len(found))) is not None:
        missing = library.jaxq_cpu_isa_missing(len(found))
        found[name.decode()] = None if missing is None else missing.decode()
    return found


def calls(library: ctypes.CDLL) -> dict[str, int]:
    """How many calls the kernels of each instruction set have served in this process."""
    return {name: int(library.jaxq_cpu_isa_calls(index)) for index, name in enumerate(isas(library))}
