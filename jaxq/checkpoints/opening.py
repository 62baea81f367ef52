"""Which reader a path belongs to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jaxq.checkpoints import awq, gguf, gptq, mlx, safetensors, zero_points
from jaxq.checkpoints.entries import Checkpoint, Select
from jaxq.checkpoints.files import refuse


def open(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint of any format served, told by its config: MLX, GGUF, GPTQ, AWQ, or dense safetensors.

    Args:
      path: a directory, or a file.

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
        return gguf.open(path)
    config = safetensors.read_config(path)
    if "quantization" in config:
        return mlx.open(path, config=config)
    method = zero_points.method_config(path)
    if not method:
        return safetensors.open(path)
    # The files that AutoGPTQ and AutoAWQ write beside config.json have no quant_method.
    name = method.get("quant_method", "awq" if "w_bit" in method else "gptq" if "desc_act" in method else None)
    if name in ("gptq", "awq"):
        return gptq.open(path) if name == "gptq" else awq.open(path)
    what = f"quantization method {str(name)[:100]!r} is not read; MLX's, gptq and awq are"
    raise refuse(path, f"config.json: {what}")


def load(path: str | os.PathLike[str], *, select: Select = None, progress: bool | None = None) -> dict[str, Any]:
    """Load a checkpoint of any format served: `open`, then `Checkpoint.load`, which says what the arguments mean.

    Returns:
      {name: jax.Array or QuantizedArray}.
    """
    return open(path).load(select, progress=progress)
