"""The safetensors container: against the safetensors package, and against files that lie."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_cases import raw_safetensors, same_bits, write_bytes

from jaxq.checkpoints import CheckpointError, safetensors
from jaxq.checkpoints.files import ALIGNMENT, atomic_directory, atomic_file, empty

ARRAYS = {
    "bool": np.array([True, False]),
    "u8": np.arange(7, dtype=np.uint8),
    "f16": np.linspace(-1, 1, 15, dtype=np.float16).reshape(3, 5),
    "f32": np.array([np.nan, -0.0, np.inf, 1e-40], np.float32),
    "i32": np.arange(-4, 8, dtype=np.int32).reshape(2, 2, 3),
    "u32": np.array([2**32 - 1], np.uint32),
    "scalar": np.array(3, np.float32),
    "none": np.zeros((0, 4), np.float32),
    "i64": np.array([2**40]),
    "bf16": np.arange(6).astype(ml_dtypes.bfloat16),
}


def layout(arrays):
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}


def test_the_package_reads_what_we_write(tmp_path):
    package = pytest.importorskip("safetensors")
    arrays = {name: array for name, array in ARRAYS.items() if name != "bf16"}
    # In the opposite order: the writer takes tensors as they come.
    safetensors.write(tmp_path / "x.safetensors", layout(arrays), reversed(arrays.items()), {"format": "mlx", "é": "ü"})
    with package.safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "mlx", "é": "ü"}
        assert set(file.keys()) == set(arrays)
        assert all(same_bits(file.get_tensor(name), array) for name, array in arrays.items())


def test_we_read_what_the_package_writes(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    package.save_file(ARRAYS, tmp_path / "x.safetensors", {"a": "b"})
    loaded = safetensors.open(tmp_path / "x.safetensors").load()
    assert set(loaded) == set(ARRAYS)
    assert all(same_bits(loaded[name], array) for name, array in ARRAYS.items())
    assert safetensors.read_header(tmp_path / "x.safetensors")[1] == {"a": "b"}


def test_a_64_bit_tensor_is_never_narrowed(tmp_path):
    arrays = {"i64": np.array([2**40]), "f32": np.ones(2, np.float32)}
    safetensors.write(tmp_path / "x.safetensors", layout(arrays), arrays.items())
    loaded = safetensors.open(tmp_path / "x.safetensors").load()
    assert isinstance(loaded["i64"], np.ndarray) and loaded["i64"][0] == 2**40
    assert isinstance(loaded["f32"], jax.Array)


def test_tensors_begin_on_multiples_of_their_item_size(tmp_path):
    arrays = {"a": np.ones(3, np.uint8), "b": np.ones(3, np.float16), "c": np.ones(3, np.uint32), "d": np.ones(1)}
    safetensors.write(tmp_path / "x.safetensors", layout(arrays), arrays.items())
    tensors, _ = safetensors.read_header(tmp_path / "x.safetensors")
    assert all(tensor.offset % tensor.dtype.itemsize == 0 for tensor in tensors.values())


def test_jax_adopts_what_a_reader_read():
    array = empty((3, 1000), np.float32)
    array[:] = 1
    assert array.ctypes.data % ALIGNMENT == 0
    if jax.default_backend() == "cpu":
        assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


def test_select_and_laziness(tmp_path):
    arrays = {f"layers.{i}.{part}": np.full(2, i, np.float32) for i in range(3) for part in ("w", "b")}
    safetensors.write(tmp_path / "x.safetensors", layout(arrays), arrays.items())
    checkpoint = safetensors.open(tmp_path / "x.safetensors")
    assert len(checkpoint) == 6 and "layers.0.w" in checkpoint and checkpoint.entries["layers.1.b"].shape == (2,)
    assert same_bits(checkpoint["layers.2.w"], arrays["layers.2.w"])
    assert set(checkpoint.load(r"^layers\.1\.")) == {"layers.1.w", "layers.1.b"}
    assert set(checkpoint.load(["layers.0.w", "b$"])) == {"layers.0.w", "layers.0.b", "layers.1.b", "layers.2.b"}
    assert set(checkpoint.load(lambda name: name.endswith("2.b"))) == {"layers.2.b"}
    with pytest.raises(ValueError, match=r"select='layer\$' is found in no name .* 'layers\.0\."):
        checkpoint.load("layer$")


def test_a_load_of_some_reads_the_others_not(tmp_path, monkeypatch):
    arrays = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
    safetensors.write(tmp_path / "x.safetensors", layout(arrays), arrays.items())
    read = []
    monkeypatch.setattr(safetensors.Tensor, "read", lambda self: read.append(self.name) or np.ones(2, np.float32))
    safetensors.open(tmp_path / "x.safetensors").load("b")
    assert read == ["b"]


# ---- files that lie


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# what is wrong -> (file, what the error says)
BAD_FILES = {
    "empty": (b"", "0 bytes are too few"),
    "cut in its length": (b"\x08\0\0", "3 bytes are too few"),
    "absurd header": (raw_safetensors({}, length=2**63), "said to be 9223372036854775808 bytes"),
    "cut header": (raw_safetensors({"w": entry()})[:-10], "truncated"),
    "no JSON": (raw_safetensors(b"\x80\x04pickle"), "can't be read"),
    "a list": (raw_safetensors(b"[]"), "no JSON object"),
    "nested": (raw_safetensors(b"[" * 200_000), "nested too deeply|can't be read"),
    "name twice": (raw_safetensors(b'{"w":1,"w":2}'), "'w' stands there twice"),
    "metadata": (raw_safetensors({"__metadata__": {"a": 1}}), "metadata are not strings"),
    "cut data": (raw_safetensors({"w": entry()}, bytes(7)), "tensor 'w': bytes 0 to 8 lie outside .* 7 bytes"),
    "outside": (raw_safetensors({"w": entry(offsets=(2**62, 2**62 + 8))}, bytes(8)), "tensor 'w': .* lie outside"),
    "backwards": (raw_safetensors({"w": entry(offsets=(8, 0))}, bytes(8)), "tensor 'w': .* lie outside"),
    "negative offset": (raw_safetensors({"w": entry(offsets=(-8, 0))}, bytes(8)), "tensor 'w': .* no pair"),
    "float offset": (raw_safetensors({"w": entry(offsets=(0.0, 8))}, bytes(8)), "tensor 'w': .* no pair"),
    "overlap": (raw_safetensors({"w": entry(), "v": entry(offsets=(4, 12))}, bytes(12)), "'v': .* overlap .* 'w'"),
    "the same bytes twice": (raw_safetensors({"w": entry(), "v": entry()}, bytes(8)), "overlap"),
    "hole": (raw_safetensors({"w": entry(), "v": entry(offsets=(9, 17))}, bytes(17)), "'v': 1 bytes before it"),
    "more at the end": (raw_safetensors({"w": entry()}, bytes(9)), "1 bytes at its end"),
    "wrong size": (raw_safetensors({"w": entry(shape=(3,))}, bytes(8)), "'w': F32.*12 bytes, but 8"),
    "size beyond 64 bits": (raw_safetensors({"w": entry(shape=(2**62, 4))}, bytes(8)), "'w': F32.* but 8"),
    "negative size": (raw_safetensors({"w": entry(shape=(-2,))}, bytes(8)), "'w': its shape"),
    "true for a size": (raw_safetensors({"w": entry(shape=(True, 2))}, bytes(8)), "'w': its shape"),
    "many dimensions": (raw_safetensors({"w": entry(shape=(1,) * 99, offsets=(0, 4))}, bytes(4)), "99 dimensions"),
    "dtype": (raw_safetensors({"w": entry("F33")}, bytes(8)), "'w': dtype 'F33'"),
    "dtype of no string": (raw_safetensors({"w": entry([])}, bytes(8)), "'w': dtype"),
    "entry of no object": (raw_safetensors({"w": 3}), "'w': its entry"),
    "one key too many": (raw_safetensors({"w": entry() | {"x": 1}}, bytes(8)), "'w': its entry"),
}


@pytest.mark.parametrize("data, message", BAD_FILES.values(), ids=list(BAD_FILES))
def test_a_file_that_lies_is_refused(tmp_path, data, message):
    path = write_bytes(tmp_path / "x.safetensors", data)
    with pytest.raises(CheckpointError, match=message) as caught:
        safetensors.open(path).load()
    assert "x.safetensors" in str(caught.value)


def test_a_file_cut_after_opening_is_refused(tmp_path):
    arrays = {"w": np.ones(1000, np.float32)}
    safetensors.write(tmp_path / "x.safetensors", layout(arrays), arrays.items())
    checkpoint = safetensors.open(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 500)
    with pytest.raises(CheckpointError, match=r"tensor 'w': .*ends at byte 500"):
        checkpoint.load()


# ---- directories


def two_files(directory, index=None):
    for file, name in (("model-00001-of-00002.safetensors", "a"), ("model-00002-of-00002.safetensors", "b")):
        safetensors.write(directory / file, layout({name: np.ones(2)}), [(name, np.ones(2))])
    if index is not None:
        (directory / safetensors.INDEX).write_text(json.dumps(index))


def test_a_directory_loads_with_and_without_an_index(tmp_path):
    two_files(tmp_path)
    assert set(safetensors.open(tmp_path).load()) == {"a", "b"}
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    two_files(tmp_path, {"weight_map": names})
    (tmp_path / "other.safetensors").write_bytes(b"not of the checkpoint")
    assert set(safetensors.open(tmp_path).load()) == {"a", "b"}


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "index, message",
    [
        ({}, "weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "tensor 'a': .* is no name"),
        ({"weight_map": {"a": "/etc/passwd"}}, "tensor 'a': .* is no name"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "tensor 'a': .* is no name"),
        ({"weight_map": {"a": 3}}, "tensor 'a': .* is no name"),
        ({"weight_map": {"a": FIRST, "b": "missing.safetensors"}}, "tensor 'b': .* missing"),
        ({"weight_map": {"a": SECOND, "b": FIRST}}, "tensor '[ab]': .* but the index has it in"),
        ({"weight_map": {"a": FIRST, "b": SECOND, "c": SECOND}}, "tensor 'c': is not in"),
        ({"weight_map": {"b": SECOND, "c": FIRST}}, "tensor 'a': .* index has it in None"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, index, message):
    two_files(tmp_path, index)
    with pytest.raises(CheckpointError, match=message):
        safetensors.open(tmp_path).load()


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for file in ("x.safetensors", "y.safetensors"):
        safetensors.write(tmp_path / file, layout({"a": np.ones(2)}), [("a", np.ones(2))])
    with pytest.raises(CheckpointError, match="tensor 'a': stands both in"):
        safetensors.open(tmp_path).load()


def test_a_pickle_is_never_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        safetensors.open(tmp_path).load()


# ---- writing


def test_the_writer_refuses_what_is_not_in_its_layout(tmp_path):
    path, arrays = tmp_path / "x.safetensors", {"a": np.ones(2, np.float32)}
    for given, message in (
        ([("b", arrays["a"])], "'b'"),
        ([("a", np.ones(3, np.float32))], r"float32\[3\]"),
        ([("a", np.ones(2))], r"float64\[2\]"),
        ([("a", arrays["a"])] * 2, "layout has None"),
        ([], "1 tensors of the layout were not given, such as 'a'"),
    ):
        with pytest.raises(ValueError, match=message):
            safetensors.write(path, layout(arrays), given)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="'z' of dtype complex128"):
        safetensors.write(path, layout({"z": np.ones(2, complex)}), [])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_bytes(tmp_path / "x", b"old")
    with pytest.raises(RuntimeError, match="on purpose"), atomic_file(path) as file:
        file.write(b"new")
        raise RuntimeError("on purpose")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_directory_is_replaced_only_when_asked(tmp_path):
    target = tmp_path / "model"
    for overwrite in (False, True):
        with atomic_directory(target, overwrite=overwrite) as directory:
            (directory / f"{overwrite}").touch()
        assert [path.name for path in target.iterdir()] == [f"{overwrite}"]
    with pytest.raises(FileExistsError, match="overwrite=True"), atomic_directory(target, overwrite=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_killed_writer_leaves_no_half_file(tmp_path):
    script = """
        import sys, time
        import jax, numpy as np
        from jaxq.checkpoints import safetensors

        def slowly():
            yield "a", np.ones(1000, np.float32)
            print("half", flush=True)
            time.sleep(60)

        struct = jax.ShapeDtypeStruct((1000,), np.float32)
        safetensors.write(sys.argv[1], {"a": struct, "b": struct}, slowly())
    """
    path = write_bytes(tmp_path / "x.safetensors", b"old")
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "half\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.read_bytes() == b"old"
    assert [file.suffix for file in tmp_path.iterdir() if file != path] == [".partial"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_killed_writer_leaves_no_half_directory(tmp_path, overwrite):
    script = """
        import pathlib, sys, time
        from jaxq.checkpoints.files import atomic_directory

        with atomic_directory(sys.argv[1], overwrite=sys.argv[2] == "True") as directory:
            (directory / "model.safetensors").write_bytes(b"half")
            print("half", flush=True)
            time.sleep(60)
    """
    path = tmp_path / "model"
    if overwrite:
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"old")
    command = [sys.executable, "-c", textwrap.dedent(script), str(path), str(overwrite)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "half\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.exists() == overwrite
    assert not overwrite or [file.read_bytes() for file in path.iterdir()] == [b"old"]
    assert [file.suffix for file in tmp_path.iterdir() if file != path] == [".partial"]
