"""Fuzz the CPU kernels' FFI handlers: random shapes, formats and contents, a third of them wrong in one place.

    python fuzz.py [--library PATH] [--seconds 60] [--seed 0] [--leaks]

A call that is right must agree with the portable kernels, and one with an index into a stack of weights with one by
that element, the nearest one where the index is out of range; a call that is wrong must come back as an error. What
must never happen, a read or a write out of bounds, is for a sanitizer to see (sanitize.sh). fuzz_handlers.cc makes far
more calls, without XLA. --leaks makes 1e5 calls instead, and fails where the process grows all the while.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import pathlib
import resource
import time

import jax
import ml_dtypes
import numpy as np

from jaxq import kernels

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
FLOAT_MODES = (("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16))


class Call:
    """One call of a handler: its operands, the shapes of its results, and its attributes."""

    def __init__(self, rng: np.random.Generator):
        affine = rng.random() < 0.7
        formats = [("affine", b, g) for b in (2, 3, 4, 5, 6, 8) for g in (16, 32, 64, 128)] if affine else FLOAT_MODES
        self.mode, self.bits, group = formats[rng.integers(len(formats))]
        step = group if group * self.bits % 32 == 0 else 2 * group
        lead = tuple(rng.integers(1, 3, rng.integers(0, 2)))
        m, n, k = int(rng.integers(0, 9)), int(rng.integers(0, 70)), int(step * rng.integers(0, 5))
        self.group = group
        dtype, scale_dtype = DTYPES[rng.integers(3)], DTYPES[rng.integers(3)] if affine else np.dtype(np.uint8)
        self.op = ("quantized_matmul", "dequantize", "quantize")[rng.integers(3)]
        packed = rng.integers(0, 2**32, (*lead, n, k * self.bits // 32), np.uint32)
        scales = rng.integers(0, 256, (*lead, n, k // group, scale_dtype.itemsize), np.uint8).view(scale_dtype)[..., 0]
        leaves = [packed, scales, scales.copy()] if affine else [packed, scales]
        self.extra = {}
        if self.op == "quantize":
            scale = (scales.shape, dtype if affine else scale_dtype)
            self.operands = [rng.standard_normal((*lead, n, k)).astype(dtype)]
            self.results = [(packed.shape, np.dtype(np.uint32)), *([scale] * (len(leaves) - 1))]
        elif self.op == "dequantize":
            self.operands, self.results = leaves, [((*lead, n, k), dtype)]
        else:
            transpose = bool(rng.integers(2))
            inner, outer = (k, n) if transpose else (n, k)
            self.operands = [rng.standard_normal((*lead, m, inner)).astype(dtype), *leaves]
            self.results, self.extra = [((*lead, m, outer), dtype)], {"transpose": transpose}
            if rng.random() < 0.4:
                self._stack(rng)

    def _stack(self, rng: np.random.Generator) -> None:
        """Multiply by one of several weights: an axis in front of each leaf, and an index behind them."""
        x, *leaves = self.operands
        length = int(rng.integers(1, 4))
        bits = [rng.integers(0, 256, (length, leaf.nbytes), np.uint8).tobytes() for leaf in leaves]
        stacks = [
            np.frombuffer(b, leaf.dtype).reshape(length, *leaf.shape) for b, leaf in zip(bits, leaves, strict=True)
        ]
        index = (int(rng.integers(length)), -1, length, 2**31 - 1, -(2**31))[rng.integers(5)]
        self.operands = [x, *stacks, np.array(index, np.int32)]

    @property
    def is_stacked(self) -> bool:
        return self.op == "quantized_matmul" and self.operands[-1].ndim == 0

    def element(self) -> Call:
        """The same product without an index, by the weight that it means."""
        x, *stacks, index = self.operands
        one = copy.copy(self)
        one.operands = [x, *(stack[np.clip(index, 0, len(stack) - 1)] for stack in stacks)]
        return one

    def _spoil_index(self, rng: np.random.Generator) -> None:
        """Of another dtype or rank, too many, or into a stack that is none, or is empty, or too short in one leaf."""
        x, *stacks, index = self.operands
        which = rng.integers(6)
        if which == 0:
            index = index.astype((np.uint32, np.int16, np.float32, np.int8)[rng.integers(4)])
        elif which == 1:
            index = index.reshape((1,) * int(rng.integers(1, 3)))
        elif which == 2:
            stacks.append(index)
        elif which == 3:
            stacks = [stack[0] if stack.ndim == 3 else stack[0, 0] for stack in stacks]
        elif which == 4:
            stacks = [stack[:0] for stack in stacks]
        else:
            place = int(rng.integers(len(stacks)))
            stacks[place] = np.concatenate([stacks[place], stacks[place][:1]])
        self.operands = [x, *stacks, index]

    def spoil(self, rng: np.random.Generator) -> bool:
        """Make one thing wrong; False where the thing drawn has nothing to spoil."""
        if self.is_stacked and rng.random() < 0.5:
            self._spoil_index(rng)
            return True
        which = rng.integers(6)
        place = int(rng.integers(len(self.operands) - self.is_stacked))
        operand = self.operands[place]
        if which == 0:
            self.operands[place] = np.zeros((*operand.shape[:-1], operand.shape[-1] + 1), operand.dtype)
        elif which == 1:
            self.operands[place] = np.zeros((operand.shape[0] + 1, *operand.shape[1:]), operand.dtype)
            return not (self.op == "quantized_matmul" and place == 0 and operand.ndim == 2)
        elif which == 2:
            self.operands[place] = np.zeros(operand.shape, np.int16)
        elif which == 3:
            shape, dtype = self.results[0]
            self.results[0] = ((*shape[:-1], shape[-1] + 1), dtype)
        elif which == 4:
            self.bits = 7
        else:
            self.operands[place] = operand.reshape(-1)
            return operand.ndim != 1
        return True

    def __str__(self) -> str:
        shapes = ", ".join(f"{a.dtype}{list(a.shape)}" for a in self.operands)
        return f"{self.op} {self.mode} bits={self.bits} group={self.group} {self.extra} of {shapes} -> {self.results}"

    def run(self, isa: str) -> list[np.ndarray]:
        results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in self.results]
        attributes = dict(mode=self.mode, bits=np.int64(self.bits), group_size=np.int64(self.group), isa=isa)
        out = jax.ffi.ffi_call(f"fuzz_jaxq_{self.op}_cpu", results)(*self.operands, **attributes, **self.extra)
        return [np.asarray(a) for a in out]


class Attention:
    """A call of the handler for attention over a cache, in the form of `Call`."""

    op = "cached_attention"

    def __init__(self, rng: np.random.Generator):
        batch, tokens, groups, repeat, layers = (int(rng.integers(1, end)) for end in (3, 20, 4, 9, 4))
        dim, position = (1, 8, 16, 24, 64, 128)[rng.integers(6)], int(rng.integers(0, 600))
        dtype, cache_dtype = DTYPES[rng.integers(3)], DTYPES[rng.integers(3)]
        shapes = [(batch, tokens, groups * repeat, dim), *[(batch, tokens, groups, dim)] * 2]
        self.operands = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
        cache = (layers, batch, groups, position + tokens + int(rng.integers(0, 3)), dim)
        self.operands += [rng.standard_normal(cache).astype(cache_dtype) for _ in range(2)]
        self.operands += [np.array(rng.integers(layers), np.int32), np.array(position, np.int32)]
        self.results = [(shapes[0], dtype), *[(cache, cache_dtype)] * 2]

    def spoil(self, rng: np.random.Generator) -> bool:
        which, place = rng.integers(6), int(rng.integers(5))
        operand = self.operands[place]
        if which == 0:
            self.operands[place] = np.zeros((*operand.shape[:-1], operand.shape[-1] + 1), operand.dtype)
        elif which == 1:
            self.operands[place] = np.zeros(operand.shape, np.int16)
        elif which == 2:
            shape, dtype = self.results[0]
            self.results[0] = ((*shape[:-1], shape[-1] + 1), dtype)
        elif which == 3:
            self.operands[5] = np.array((-1, self.operands[3].shape[0], 2**31 - 1, -(2**31))[rng.integers(4)], np.int32)
        elif which == 4:
            past = self.operands[3].shape[3] - self.operands[0].shape[1] + 1
            self.operands[6] = np.array((-1, past, 2**31 - 1, -(2**31))[rng.integers(4)], np.int32)
        else:
            self.operands[place] = operand.reshape(-1)
        return True

    def __str__(self) -> str:
        shapes = ", ".join(f"{a.dtype}{list(a.shape)}" for a in self.operands)
        return f"{self.op} of {shapes} -> {self.results}, layer and position {self.operands[5:]}"

    def run(self, isa: str) -> list[np.ndarray]:
        results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in self.results]
        call = jax.ffi.ffi_call("fuzz_jaxq_cached_attention_cpu", results, input_output_aliases={3: 1, 4: 2})
        return [np.asarray(a) for a in call(*self.operands, scale=np.float32(0.3), isa=isa)]


def agree(call: Call | Attention, ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    """Bits where whole numbers or conversions are due; for products, errors of the size of float32's.

    Contents are random bits, so scales may be NaN, infinite or huge: a product is compared where both are finite, with
    a bound of 1e-3 of the largest result, which catches a wrong index and forgives cancellation.
    """
    if call.op == "cached_attention" and not all(map(np.array_equal, ours[1:], theirs[1:])):
        return False
    if call.op in ("quantize", "dequantize"):
        return all(
            np.array_equal(a.view(np.uint8), b.view(np.uint8)) or _same(a, b) for a, b in zip(ours, theirs, strict=True)
        )
    a, b = (v[0].astype(np.float64) for v in (ours, theirs))
    finite = np.isfinite(a) & np.isfinite(b)
    scale = np.abs(b[finite]).max(initial=0.0)
    wild = scale > 1e30 or not np.isfinite(b).all()
    tolerance = {np.dtype(np.float32): 1e-3, np.dtype(np.float16): 2e-3}.get(ours[0].dtype, 1e-2)
    return wild or bool((np.abs(a - b)[finite] <= tolerance * scale + 1e-4).all())


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for the sign and payload of NaNs."""
    if a.dtype == np.uint32 or a.dtype == np.uint8:
        return False
    a, b = a.astype(np.float32), b.astype(np.float32)
    return bool(((a == b) | (np.isnan(a) & np.isnan(b))).all())


def fuzz(library: ctypes.CDLL, seconds: float, seed: int) -> None:
    isas = [name for name, missing in kernels.isas(library).items() if missing is None]
    rng, end = np.random.default_rng(seed), time.monotonic() + seconds
    right = wrong = indexed = 0
    while time.monotonic() < end:
        call, isa = (Call, Attention)[rng.random() < 0.25](rng), isas[rng.integers(len(isas))]
        if rng.random() < 1 / 3:
            # XLA drops a call whose result is empty, so nobody sees what is wrong with it.
            if not call.spoil(rng) or any(0 in shape for shape, _ in call.results):
                continue
            try:
                call.run(isa)
            except Exception:
                wrong += 1
                continue
            raise SystemExit(f"a wrong call was served: {call}")
        theirs = call.element() if isinstance(call, Call) and call.is_stacked else call
        if not agree(call, call.run(isa), theirs.run("scalar")):
            raise SystemExit(f"{isa} and scalar disagree: {call}")
        right += 1
        indexed += theirs is not call
    print(f"fuzz: {right} right calls, {indexed} of them with an index, and {wrong} wrong ones over {', '.join(isas)}")


def leaks() -> None:
    """Products of one row and of several, and both conversions, large enough for XLA's threads to help.

    A block that is lost with every call takes 32 bytes at the least: 780 KiB in each quarter. An allocator that takes
    more from the system now and then does not do so in every one of them.
    """
    rng = np.random.default_rng(0)
    weight = [rng.integers(0, 2**32, (512, 32), np.uint32)] + 2 * [rng.random((512, 4)).astype(np.float32)]
    results = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in weight]
    dense = rng.standard_normal((512, 256)).astype(np.float32)
    attributes = dict(mode="affine", bits=np.int64(4), group_size=np.int64(64), isa="")
    programs = []
    for op, result, operands in (
        ("quantized_matmul", jax.ShapeDtypeStruct((1, 512), np.float32), [dense[:1], *weight]),
        ("quantized_matmul", jax.ShapeDtypeStruct((9, 512), np.float32), [dense[:9], *weight]),
        ("dequantize", jax.ShapeDtypeStruct(dense.shape, np.float32), weight),
        ("quantize", results, [dense]),
    ):
        extra = {"transpose": True} if op == "quantized_matmul" else {}
        call = functools.partial(jax.ffi.ffi_call(f"fuzz_jaxq_{op}_cpu", result), **attributes, **extra)
        arrays = [jax.numpy.asarray(operand) for operand in operands]
        programs.append((jax.jit(call).lower(*arrays).compile(), arrays))
    peaks = []
    for _ in range(4):
        for i in range(25_000):
            program, arrays = programs[i % len(programs)]
            jax.block_until_ready(program(*arrays))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    grown = np.diff(peaks)
    print(f"leaks: 1e5 calls; after the first quarter the process grew by {grown.tolist()} KiB in the others")
    if grown.min() > 400:
        raise SystemExit("the process grows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=pathlib.Path, help="default: the one that jaxq finds")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--leaks", action="store_true")
    args = parser.parse_args()
    library = kernels.load_cpu_library(args.library) if args.library else kernels.cpu_library()
    for name in kernels.CPU_HANDLERS:
        jax.ffi.register_ffi_target("fuzz_" + name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    if args.leaks:
        leaks()
    else:
        fuzz(library, args.seconds, args.seed)


if __name__ == "__main__":
    main()
