"""Group-wise quantized weights for JAX."""

from jaxq.array import QuantizedArray, is_quantized
from jaxq.lowerings import implementations
from jaxq.primitives.common import use_implementation
from jaxq.primitives.dequantize import dequantize
from jaxq.primitives.quantize import quantize
from jaxq.primitives.quantized_matmul import quantized_matmul
from jaxq.spec import QuantSpec

__version__ = "0.1.0"

__all__ = [
    "QuantSpec",
    "QuantizedArray",
    "dequantize",
    "implementations",
    "is_quantized",
    "quantize",
    "quantized_matmul",
    "use_implementation",
]
