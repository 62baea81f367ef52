"""Group-wise quantized weights for JAX."""

from jaxq.array import QuantizedArray, is_quantized
from jaxq.checkpoints.trees import load, save
from jaxq.dispatch import dispatch, register_dispatch_rule
from jaxq.lowerings import implementations
from jaxq.primitives.common import use_implementation
from jaxq.primitives.dequantize import dequantize
from jaxq.primitives.quantize import quantize
from jaxq.primitives.quantized_matmul import quantized_matmul
from jaxq.reports import Report, report
from jaxq.residency import Residency, resident
from jaxq.spec import QuantSpec
from jaxq.tree import dequantize_tree, quantize_tree

__version__ = "0.1.0"

__all__ = [
    "QuantSpec",
    "QuantizedArray",
    "Report",
    "Residency",
    "dequantize",
    "dequantize_tree",
    "dispatch",
    "implementations",
    "is_quantized",
    "load",
    "quantize",
    "quantize_tree",
    "quantized_matmul",
    "register_dispatch_rule",
    "report",
    "resident",
    "save",
    "use_implementation",
]
