"""The other libraries of benchmarks/cpu.py, each set up for the same int4 weight in groups of 64."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jaxq

ALL = ("ort0", "ort4", "openvino", "torch_int4", "torch_dense", "jax_dense", "mlx")
SLOW = ("mlx",)  # seconds a call for many rows: only where it is asked for
THREADS = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
MISSING: dict[str, str] = {}


class Peers:
    """Functions that multiply by the same weight, or by a dense one of its shape."""

    def __init__(self, qw: jaxq.QuantizedArray, dtype: str, names: list[str]):
        self.qw, self.dtype, self.builders = qw, dtype, {}
        codes = np.asarray(qw.packed).view(np.uint8)
        self.nibbles = codes.reshape(*qw.shape[:-1], -1)
        for name in names:
            if (name.startswith("ort") and dtype != "float32") or (name == "torch_int4" and dtype != "bfloat16"):
                continue
            try:
                self.builders[name] = getattr(self, f"_{name}")()
            except ImportError as error:
                MISSING[name] = str(error)

    def functions(self, x: jax.Array) -> dict[str, Callable[[], object]]:
        """Calls that multiply x[M, K]."""
        return {name: build(x) for name, build in self.builders.items()}

    def _ort(self, level: int):
        import onnxruntime
        from onnx import TensorProto, helper

        (n, k), group = self.qw.shape, 64
        blocks = self.nibbles.reshape(n, k // group, group // 2)
        scales = np.asarray(self.qw.scales, np.float32)
        node = helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=group,
            accuracy_level=level,
        )  # fmt: skip
        graph = helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", n])],
            [
                helper.make_tensor("w", TensorProto.UINT8, blocks.shape, blocks.tobytes(), raw=True),
                helper.make_tensor("s", TensorProto.FLOAT, (scales.size,), scales.tobytes(), raw=True),
            ],
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets)
        model.ir_version = 9
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS  # it would count the machine's CPUs, not those that are ours
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)

        def build(x):
            feed = {"x": np.asarray(x)}
            return lambda: session.run(None, feed)

        return build

    def _ort0(self):
        return self._ort(0)

    def _ort4(self):
        return self._ort(4)

    def _openvino(self):
        import openvino
        from openvino import opset13 as op

        (n, k), group = self.qw.shape, 64
        shape = [n, k // group, group]
        codes = openvino.Tensor(self.nibbles.reshape(-1).copy(), openvino.Shape(shape), openvino.Type.u4)
        scales = np.asarray(self.qw.scales, np.float32).astype(np.float16)[..., None]
        x = op.parameter([-1, k], np.float32)
        centred = op.subtract(
            op.convert(op.constant(codes), np.float16), op.constant(np.full(scales.shape, 8, np.float16))
        )
        dense = op.reshape(op.multiply(centred, op.constant(scales)), op.constant(np.array([n, k])), False)
        y = op.matmul(x, op.convert(dense, np.float32), False, True)
        options = {
            "INFERENCE_PRECISION_HINT": "f32" if self.dtype == "float32" else "bf16",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": str(THREADS),
        }
        request = openvino.Core().compile_model(openvino.Model([y], [x]), "CPU", options).create_infer_request()

        def build(x):
            feed = [np.asarray(x, np.float32)]
            return lambda: request.infer(feed)

        return build

    def _torch(self, x):
        import torch

        return torch.from_numpy(np.array(x, np.float32)).to(getattr(torch, self.dtype))

    def _torch_int4(self):
        import torch

        codes = np.stack([self.nibbles & 15, self.nibbles >> 4], -1).reshape(self.qw.shape).astype(np.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(codes), 1)
        scales = self._torch(self.qw.scales).T
        both = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()

        def build(x):
            x = self._torch(x)
            return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, both)

        return build

    def _torch_dense(self):
        w = self._torch(jaxq.dequantize(self.qw))

        def build(x):
            x = self._torch(x)
            return lambda: x @ w.T

        return build

    def _jax_dense(self):
        w = jaxq.dequantize(self.qw)
        product = jax.jit(lambda x, w: x @ w.T)
        return lambda x: lambda: product(x, w).block_until_ready()

    def _mlx(self):
        import mlx.core as mx

        def array(a):
            return mx.array(np.asarray(a, np.float32)).astype(getattr(mx, self.dtype))

        packed = mx.array(np.asarray(self.qw.packed))
        scales, biases = array(self.qw.scales), array(self.qw.biases)

        def run(x):
            mx.eval(mx.quantized_matmul(x, packed, scales, biases, group_size=64, bits=4, stream=mx.cpu))

        def build(x):
            x = array(jnp.asarray(x))
            return lambda: run(x)

        return build
