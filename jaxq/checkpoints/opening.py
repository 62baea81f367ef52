"""Which reader a path belongs to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jaxq.checkpoints import awq, gguf, gptq, mlx, safetensors, trees, zero_points
from jaxq.checkpoints.entries import Checkpoint, Select
from jaxq.checkpoints.files import refuse


def open(path: str | os.PathLike[str], *, scale_dtype: Any = None, dequantize: bool = False) -> Checkpoint:
    """Open a checkpoint of any format served, told by its config: MLX, GGUF, GPTQ, AWQ, or dense safetensors.

    A file of `jaxq.save`'s opens too, its arrays by their paths; `jaxq.load` gives the tree.

    Args:
      path: a directory, or a file.
      scale_dtype: for GGUF, GPTQ and AWQ, the dtype of scales and biases; None: exact. See their `open`.
      dequantize: load dense what no QuantizedArray can hold: GGUF's codebook types, GPTQ's `desc_act`.

    Returns:
      A `Checkpoint`: names and abstract arrays now, each tensor read when it is asked for.

    Raises:
      FileNotFoundError: nothing stands at `path`.
      CheckpointError: a format that is not served, or files that are not well-formed, by tensor name.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"open: {path} does not exist; pass a local directory or file")
    if path.suffix == ".gguf":
        return gguf.open(path, scale_dtype=scale_dtype, dequantize=dequantize)
    if path.is_file() and (saved := trees.open_if_saved(path)) is not None:
        return saved
    config = safetensors.read_config(path)
    if "quantization" in config:
        return mlx.open(path, config=config)
    method = zero_points.method_config(path)
    if not method:
        return safetensors.open(path)
    # The files that AutoGPTQ and AutoAWQ write beside config.json have no quant_method.
    name = method.get("quant_method", "awq" if "w_bit" in method else "gptq" if "desc_act" in method else None)
    if name == "gptq":
        return gptq.open(path, scale_dtype=scale_dtype, dequantize=dequantize)
    if name == "awq":
        return awq.open(path, scale_dtype=scale_dtype)
    what = f"quantization method {str(name)[:100]!r} is not read; MLX's, gptq and awq are"
    raise refuse(path, f"config.json: {what}")


def load(
    path: str | os.PathLike[str],
    *,
    select: Select = None,
    progress: bool | None = None,
    scale_dtype: Any = None,
    dequantize: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint of any format served: `open`, then `Checkpoint.load`, which say what the arguments mean.

    Returns:
      {name: jax.Array or QuantizedArray}.
    """
    return open(path, scale_dtype=scale_dtype, dequantize=dequantize).load(select, progress=progress)
