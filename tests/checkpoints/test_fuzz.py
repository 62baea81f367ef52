"""Mutated files of every format load, or are refused by an error that is meant, without a large allocation."""

import os
import random
import sys
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
import test_gguf
import test_gptq_awq

import jaxq
from jaxq import checkpoints
from jaxq.checkpoints import CheckpointError, files, mlx

ROUNDS = 300
# What any load of these files of at most 64 kB may allocate: itself, as float32 where it is dequantized, and Python's
# objects for the header. A size that a mutation made up and that was believed would be far beyond.
LIMIT = 8 << 20


def mlx_seed(path):
    tensors = {"a.weight": jaxq.quantize(jnp.ones((8, 64)), bits=4, group_size=32), "b": jnp.ones(3)}
    mlx.save(path, tensors, {"model_type": "x", "hidden_size": 64}, shard_bytes=300)
    return path


def gptq_seed(path):
    return test_gptq_awq.save_gptq(path, *test_gptq_awq.made(64, 32, 4, 32), 4, 32)


def awq_seed(path):
    return test_gptq_awq.save_awq(path, *test_gptq_awq.made(64, 32, 4, 32)[:3], 32)


def gguf_seed(path):
    path.mkdir()
    tensors = {name: (name, test_gguf.blocks(name, (2, 256))) for name in ("Q4_0", "Q6_K", "MXFP4", "TQ1_0")}
    test_gguf.write(path / "x.gguf", tensors | {"n": np.ones(3, np.float32)})
    return path / "x.gguf"


def tree_seed(path):
    path.mkdir()
    jaxq.save(path / "x.safetensors", {"w": [jaxq.quantize(jnp.ones((8, 64)), bits=4)], "b": 0.5, "n": np.ones(2)})
    return path / "x.safetensors"


SEEDS = {"mlx": mlx_seed, "gptq": gptq_seed, "awq": awq_seed, "gguf": gguf_seed, "tree": tree_seed, "saved": tree_seed}
# Numbers that lie on the edges of what readers compute with.
EDGES = [0, 1, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three changes, mostly in the header: bits, integers, digits of the JSON, runs cut out or repeated."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(min(len(out), rng.choice((32, 600, 4000, len(out)))), 1))
        kind = rng.randrange(8)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            width = rng.choice((4, 8))
            out[at : at + width] = (rng.choice(EDGES) % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 2:  # a number in the JSON
            digits = [i for i, byte in enumerate(out[:4000]) if chr(byte).isdigit()]
            if digits:
                i = rng.choice(digits)
                out[i : i + 1] = str(rng.choice([*EDGES, -1, 1.5, "[]", "null", '"x"'])).encode()
        elif kind == 3:
            del out[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            del out[at:]
        elif kind == 5:
            out[at:at] = out[at : at + rng.randrange(1, 200)]
        elif kind == 6:
            out += bytes(rng.randrange(1, 100))
        else:
            out[at : at + 1] = rng.choice((b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\xff", b"e9", b"\0"))
    return bytes(out)


@pytest.mark.parametrize("format", SEEDS)
def test_mutated_files(tmp_path, format, monkeypatch):
    monkeypatch.setattr(files, "HUGE_PAGE", LIMIT << 40)  # tracemalloc does not see what the system maps
    seed = SEEDS[format](tmp_path / "m")
    there = [seed] if seed.is_file() else sorted(seed.iterdir())
    original = {file: file.read_bytes() for file in there}
    load = jaxq.load if format == "tree" else checkpoints.load
    load(seed)
    outcomes = {"loaded": 0, "refused": 0}
    for i in range(ROUNDS):
        rng = random.Random(f"{format} {i}")
        file = rng.choice(there)
        file.write_bytes(mutate(original[file], rng))
        tracemalloc.start()
        try:
            load(seed)
            outcomes["loaded"] += 1
        except CheckpointError as error:
            outcomes["refused"] += 1
            assert len(str(error)) < 2000 + len(str(seed))
        except Exception as error:
            raise AssertionError(f"mutation {i} of {file.name}: {type(error).__name__}") from error
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            file.write_bytes(original[file])
        assert peak < LIMIT, f"mutation {i} of {file.name}: {peak} bytes"
    # A mutator that always or never breaks the file would test nothing.
    assert min(outcomes.values()) >= ROUNDS // 50, outcomes


def test_files_that_vanish_or_are_directories(tmp_path):
    seed = mlx_seed(tmp_path / "m")
    checkpoint = checkpoints.open(seed)
    for file in seed.iterdir():
        file.unlink()
    assert checkpoint["a.weight"].bits == 4  # open files stay
    with pytest.raises(CheckpointError):
        checkpoints.open(seed)
    os.mkdir(seed / "model.safetensors")
    with pytest.raises((CheckpointError, OSError)):
        checkpoints.open(seed)


@pytest.mark.skipif(sys.platform == "win32", reason="needs sparse files")
def test_a_huge_hole_is_not_read(tmp_path):
    """A file of a terabyte that is all hole."""
    path = tmp_path / "x.safetensors"
    path.write_bytes((9_000_000).to_bytes(8, "little"))
    os.truncate(path, 1 << 40)
    with pytest.raises(CheckpointError):
        checkpoints.open(path)
