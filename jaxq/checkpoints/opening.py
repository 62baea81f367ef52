"""Which reader a path belongs to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jaxq.checkpoints import gguf, mlx, safetensors
from jaxq.checkpoints.entries import Checkpoint, Select
from jaxq.checkpoints.files import refuse


def open(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint of any format served, told by its config: MLX, GGUF, or dense safetensors.

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
    method = config.get("quantization_config")
    if method is not None:
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise refuse(path, f"config.json: quantization method {str(name)[:100]!r} is not read; read is MLX's")
    return safetensors.open(path)


def load(path: str | os.PathLike[str], *, select: Select = None, progress: bool | None = None) -> dict[str, Any]:
    """Load a checkpoint of any format served: `open`, then `Checkpoint.load`, which says what the arguments mean.

    Returns:
      {name: jax.Array or QuantizedArray}.
    """
    return open(path).load(select, progress=progress)
