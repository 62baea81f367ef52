"""quantize_tree, dequantize_tree and report: what is quantized, along which axis, at what cost, and what is refused."""

from __future__ import annotations

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq

INT4 = jaxq.QuantSpec(4, 64)
INT8 = jaxq.QuantSpec(8, 32)


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).standard_normal(shape)).astype(dtype)


def flax_like() -> dict:
    return {
        "params": {
            "Embed_0": {"embedding": normal(100, 64)},
            "Dense_0": {"kernel": normal(64, 96), "bias": normal(96)},
            "LayerNorm_0": {"scale": normal(64)},
            "layers": {
                "Dense_0": {"kernel": normal(3, 128, 64), "bias": normal(3, 64)},
                "LayerNorm_0": {"scale": normal(16, 64)},
            },
            "attention": {
                **{name: {"kernel": normal(64, 2, 32), "bias": normal(2, 32)} for name in ("query", "key", "value")},
                "out": {"kernel": normal(2, 64, 48), "bias": normal(48)},
            },
            "out": {"kernel": normal(64, 32)},
            "Conv_0": {"kernel": normal(3, 3, 64, 64)},
            "steps": jnp.arange(64 * 64).reshape(64, 64),
        }
    }


EXPECTED_AXES = {
    "params/Embed_0/embedding": (-1,),
    "params/Dense_0/kernel": (-2,),
    "params/layers/Dense_0/kernel": (-2,),
    "params/attention/query/kernel": (-3,),
    "params/attention/key/kernel": (-3,),
    "params/attention/value/kernel": (-3,),
    "params/attention/out/kernel": (-3, -2),
    "params/out/kernel": (-2,),
}


def paths(tree) -> dict[str, object]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=jaxq.is_quantized)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def quantized(tree) -> dict[str, jaxq.QuantizedArray]:
    return {path: leaf for path, leaf in paths(tree).items() if jaxq.is_quantized(leaf)}


def test_axes_follow_the_names_of_flax():
    tree = flax_like()
    result = quantized(jaxq.quantize_tree(tree, INT4))
    assert {path: leaf.axis for path, leaf in result.items()} == EXPECTED_AXES
    dense = paths(tree)
    for path, leaf in result.items():
        expected = jaxq.quantize(dense[path], bits=4, group_size=64, axis=EXPECTED_AXES[path])
        for name in ("packed", "scales", "biases"):
            np.testing.assert_array_equal(getattr(leaf, name), getattr(expected, name))


def test_what_is_left_alone_is_the_very_array_and_has_its_reason():
    tree, report = flax_like(), jaxq.Report()
    result = jaxq.quantize_tree(tree, INT4, report=report)
    before, after = paths(tree), paths(result)
    assert all(after[path] is before[path] for path in before if path not in EXPECTED_AXES)
    notes = {row.path: row.note for row in report.skipped}
    assert set(notes) == set(before) - set(EXPECTED_AXES) and all(notes.values())
    for path, word in {
        "params/Dense_0/bias": "vector",
        "params/layers/Dense_0/bias": "bias",
        "params/layers/LayerNorm_0/scale": "scale",
        "params/attention/query/bias": "bias",
        "params/Conv_0/kernel": "convolution",
        "params/steps": "int32",
    }.items():
        assert word in notes[path], (path, notes[path])
    assert [row.path for row in report.rows] == list(before)


@pytest.mark.parametrize(
    ("path", "leaf", "word"),
    [
        ("w", np.zeros((64, 100), np.float32), "100"),
        ("w", np.zeros((64, 64), np.float64), "float64"),
        ("w", np.zeros((8, 64), np.float32), "small"),
        ("w", np.zeros((0, 64), np.float32), "empty"),
        ("pos_embedding", np.zeros((1, 64, 64), np.float32), "position"),
        ("lora_a", np.zeros((64, 64), np.float32), "adapter"),
        ("input_layernorm", np.zeros((64, 64), np.float32), "normalization"),
    ],
)
def test_reasons(path, leaf, word):
    report = jaxq.Report()
    result = jaxq.quantize_tree({path: leaf}, INT4, report=report)
    assert result[path] is leaf
    assert word in report.rows[0].note


def test_rules_first_match_holds():
    tree = {
        "head": {"kernel": normal(64, 128)},
        "body": {"kernel": normal(64, 128)},
        "tail": {"kernel": normal(64, 32)},
    }
    report = jaxq.Report()
    rules = [("^head/", INT8), ("body", None), ("body|nothing", INT4)]
    result = jaxq.quantize_tree(tree, rules, report=report)
    assert {path: str(leaf.spec) for path, leaf in quantized(result).items()} == {"head/kernel": "int8g32"}
    notes = {row.path: row.note for row in report.skipped}
    assert "'body'" in notes["body/kernel"] and "no rule" in notes["tail/kernel"]


def test_rule_with_axis_overrides_name_and_size():
    tree = {"norm": {"scale": normal(64, 4)}, "kernel": normal(64, 64)}
    result = jaxq.quantize_tree(tree, [("scale", INT4, -2), ("kernel", INT4, -1)])
    assert result["norm"]["scale"].axis == (-2,) and result["kernel"].axis == (-1,)


def test_rule_as_a_function():
    seen = []

    def rule(path, leaf):
        seen.append((path, tuple(leaf.shape)))
        return {"a": INT8, "b": (INT4, -2), "c": None}[path]

    tree = {"a": normal(4, 32), "b": normal(64, 64), "c": normal(64, 64)}
    result = jaxq.quantize_tree(tree, rule)
    assert seen == [("a", (4, 32)), ("b", (64, 64)), ("c", (64, 64))]
    assert result["a"].axis == (-1,) and result["b"].axis == (-2,) and result["c"] is tree["c"]


KERNELS = {
    # kernel, bias: axis
    "Dense": ((64, 96), (96,), (-2,)),
    "square Dense": ((64, 64), (64,), (-2,)),
    "stack of Dense": ((3, 64, 96), (3, 96), (-2,)),
    "DenseGeneral in, [heads, dim]": ((64, 2, 48), (2, 48), (-3,)),
    "DenseGeneral [heads, dim], out": ((3, 32, 48), (48,), (-3, -2)),
    "small heads": ((4, 16, 64), (64,), (-1,)),
    "stack of DenseGeneral in": ((3, 64, 2, 48), (3, 2, 48), (-3,)),
    "stack of DenseGeneral out": ((3, 2, 32, 48), (3, 48), (-3, -2)),
    "no bias": ((3, 64, 48), None, (-2,)),
    "no bias, few heads": ((48, 3, 64), None, (-1,)),
    "unrelated bias": ((64, 3, 64), (5,), (-1,)),
    "convolution by shape": ((3, 3, 32, 48), (48,), None),
    "no bias, rank 4": ((3, 2, 32, 48), None, None),
    "no axis": ((3, 2, 48), None, None),
}


@pytest.mark.parametrize("name", KERNELS)
def test_axis_of_kernels(name):
    kernel, bias, axis = KERNELS[name]
    tree = {"layer": {"kernel": normal(*kernel)} | ({} if bias is None else {"bias": normal(*bias)})}
    found = jaxq.quantize_tree(tree, jaxq.QuantSpec(4, 32))["layer"]["kernel"]
    assert found is tree["layer"]["kernel"] if axis is None else found.axis == axis


def test_default_axis_of_other_names():
    assert jaxq.quantize_tree({"w": normal(64, 32)}, INT4, axis=-2)["w"].axis == (-2,)


@pytest.mark.parametrize("rules", [4, "w", {"w": INT4}, [("w", 4)], [(INT4, "w")], [("w",)], None])
def test_what_is_no_rule_is_refused(rules):
    with pytest.raises(TypeError, match="quantize_tree"):
        jaxq.quantize_tree({"w": normal(64, 64)}, rules)


def test_bad_pattern_and_bad_answer_are_refused():
    with pytest.raises(ValueError, match=r"quantize_tree: the pattern '\('"):
        jaxq.quantize_tree({"w": normal(64, 64)}, [("(", INT4)])
    with pytest.raises(TypeError, match="quantize_tree: the rule gave 4 for w"):
        jaxq.quantize_tree({"w": normal(64, 64)}, lambda path, leaf: 4)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_by_path(mode, value):
    w = np.array(normal(64, 64))
    w[3, 5] = value
    with pytest.raises(ValueError, match=re.escape("quantize_tree: layer/w holds a NaN, an infinity")):
        jaxq.quantize_tree({"ok": normal(64, 64), "layer": {"w": w}}, jaxq.QuantSpec(mode=mode))


def test_shared_arrays_stay_shared():
    w = normal(64, 64)
    result = jaxq.quantize_tree({"a": w, "c": w}, INT4)
    assert result["a"] is result["c"]


def test_quantized_leaves_stay():
    once = jaxq.quantize_tree({"a": normal(64, 64)}, INT4)
    report = jaxq.Report()
    assert jaxq.quantize_tree(once, INT8, report=report)["a"] is once["a"]
    assert report.rows[0].note == "quantized already"


# ---- memory


def live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())


def watch(samples: list[int]):
    """A progress function that samples what is alive before each weight and after the last."""

    def progress(items):
        # Held, so that no garbage of an earlier test is collected between two samples.
        held = jax.live_arrays()
        for item in items:
            samples.append(live_bytes())
            yield item
        samples.append(live_bytes())
        del held

    return progress


def test_donated_leaves_are_freed_one_by_one():
    tree = {f"w{i}": normal(64, 256, seed=i) for i in range(6)} | {"bias": normal(64)}
    samples: list[int] = []
    result = jaxq.quantize_tree(tree, INT4, donate=True, progress=watch(samples))
    dense = 64 * 256 * 4
    # 4-bit codes, and an f32 scale and bias for each 64.
    packed = 64 * 256 * 4 // 8 + 64 * 256 // 64 * 8
    assert all(result[f"w{i}"].nbytes == packed for i in range(6))
    # Each step frees one dense weight and adds one quantized one, and leaves nothing else alive.
    assert [b - a for a, b in itertools.pairwise(samples)] == [packed - dense] * 6
    assert all(tree[f"w{i}"].is_deleted() for i in range(6)) and not tree["bias"].is_deleted()


def test_nothing_is_freed_unasked():
    tree = {"a": normal(64, 64), "c": normal(64, 64)}
    jaxq.quantize_tree(tree, INT4)
    assert not any(leaf.is_deleted() for leaf in tree.values())


def test_donation_spares_what_stays_dense_elsewhere():
    w = normal(64, 64)
    result = jaxq.quantize_tree({"a": w, "b": w, "c": w}, [("a|c", INT4)], donate=True)
    assert result["b"] is w and not w.is_deleted()
    result = jaxq.quantize_tree({"a": w, "c": w}, [("a", INT4), ("c", INT8)], donate=True)
    assert w.is_deleted() and result["a"].bits == 4 and result["c"].bits == 8


def test_host_arrays_come_to_the_device_one_by_one():
    tree = {f"w{i}": np.asarray(normal(64, 256, seed=i)) for i in range(4)}
    samples: list[int] = []
    jaxq.quantize_tree(tree, INT4, progress=watch(samples))
    packed = 64 * 256 * 4 // 8 + 64 * 256 // 64 * 8
    assert [b - a for a, b in itertools.pairwise(samples)] == [packed] * 4


# ---- under transformations


def test_eval_shape_and_jit():
    tree = flax_like()
    abstract = jax.eval_shape(lambda t: jaxq.quantize_tree(t, INT4), tree)
    eager = jaxq.quantize_tree(tree, INT4)
    assert jax.tree.structure(abstract) == jax.tree.structure(eager)
    compiled = jax.jit(lambda t: jaxq.quantize_tree(t, INT4))(tree)
    for (path, a), (_, b), c in zip(
        *(jax.tree_util.tree_leaves_with_path(t) for t in (eager, compiled)), jax.tree.leaves(abstract), strict=True
    ):
        assert (c.shape, c.dtype) == (a.shape, a.dtype), path
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    with pytest.raises(ValueError, match="donate and report"):
        jax.jit(lambda t: jaxq.quantize_tree(t, INT4, donate=True))(tree)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_dequantize_tree(dtype):
    tree = flax_like()
    dense = jaxq.dequantize_tree(jaxq.quantize_tree(tree, INT4), dtype)
    assert jax.tree.structure(dense) == jax.tree.structure(tree)
    for path, leaf in paths(dense).items():
        assert leaf.shape == paths(tree)[path].shape
        if path in EXPECTED_AXES:
            assert leaf.dtype == (dtype or "float32")
        else:
            assert leaf is paths(tree)[path]


# ---- report


def test_report_agrees_with_numpy():
    tree = {"a": normal(64, 128), "c": normal(32, 64, dtype="bfloat16"), "bias": normal(64)}
    rules = [("^a", jaxq.QuantSpec(3, 32)), ("^c", jaxq.QuantSpec(mode="nvfp4"))]
    filled = jaxq.Report()
    result = jaxq.quantize_tree(tree, rules, report=filled)
    for report in (filled, jaxq.report(result, original=tree)):
        rows = {row.path: row for row in report.rows}
        # a: 3 bits each, and an f32 scale and bias for each 32; c: 4 bits, a byte for each 16.
        assert rows["a"].nbytes == 64 * 128 * 3 // 8 + 64 * 128 // 32 * 8
        assert rows["c"].nbytes == 32 * 64 * 4 // 8 + 32 * 64 // 16
        assert rows["bias"].nbytes == 256
        assert [rows[p].format for p in ("a", "c", "bias")] == ["int3g32", "nvfp4", "float32"]
        assert [rows[p].dense_nbytes for p in ("a", "c", "bias")] == [64 * 128 * 4, 32 * 64 * 2, 256]
        assert rows["a"].bits_per_weight == 3 + 64 / 32 and rows["c"].bits_per_weight == 4.5
        assert report.nbytes == sum(row.nbytes for row in report.rows)
        assert report.weights == 64 * 128 + 32 * 64 + 64
        assert report.bits_per_weight == 8 * report.nbytes / report.weights
        for path in ("a", "c"):
            w = np.asarray(tree[path], np.float64)
            error = np.linalg.norm(np.asarray(result[path].dequantize("float32"), np.float64) - w) / np.linalg.norm(w)
            # Each of the two norms sums n <= 2**13 squares in f32: at most n * 2**-24 relative error of the sum, half
            # of that after the square root; and the difference itself is rounded once per element.
            assert rows[path].relative_error == pytest.approx(error, rel=2**13 * 2**-24)
        assert rows["bias"].relative_error is None


def test_report_prints_and_exports():
    tree = flax_like()
    report = jaxq.Report()
    result = jaxq.quantize_tree(tree, INT4, report=report)
    rows = json.loads(json.dumps(report.to_dicts()))
    assert [row["path"] for row in rows] == list(paths(result))
    text = str(report)
    for row in report.rows:
        line = next(line for line in text.splitlines() if line.startswith(row.path + " "))
        assert f"{row.nbytes:,}" in line and row.format in line and row.note in line
    assert f"{report.nbytes:,}" in text
    assert len(text.splitlines()) == len(report.rows) + 5


def test_report_without_the_original():
    tree = flax_like()
    report = jaxq.report(jaxq.quantize_tree(tree, INT4))
    assert all(row.relative_error is None for row in report.rows)
    assert all(row.note for row in report.skipped)
    assert not any(row.note for row in report.quantized)


def test_report_refuses_another_original():
    tree = {"a": normal(64, 64)}
    result = jaxq.quantize_tree(tree, INT4)
    with pytest.raises(ValueError, match="report: a is missing in original"):
        jaxq.report(result, original={"b": tree["a"]})
    with pytest.raises(ValueError, match=r"report: a has shape \(32, 64\) in original"):
        jaxq.report(result, original={"a": normal(32, 64)})


# ---- progress


@pytest.mark.parametrize("name", ["tqdm", "rich", True])
def test_progress_bar(name, capsys):
    pytest.importorskip("tqdm" if name is True else name)
    result = jaxq.quantize_tree({"a": normal(64, 64), "c": normal(64, 64)}, INT4, progress=name)
    assert len(quantized(result)) == 2
    out = capsys.readouterr()
    assert "quantize" in out.out + out.err and "100%" in out.out + out.err


def test_unknown_progress_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="quantize_tree: progress='bar'"):
        jaxq.quantize_tree({"a": normal(64, 64)}, INT4, progress="bar")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for progress in (True, "tqdm"):
        with pytest.raises(ImportError, match=r"jaxq\[progress\]"):
            jaxq.quantize_tree({"a": normal(64, 64)}, INT4, progress=progress)
