"""Quantized checkpoints: read and written exactly, as {name: array or QuantizedArray}."""

from jaxq.checkpoints.conversion import convert
from jaxq.checkpoints.entries import Checkpoint, Entry
from jaxq.checkpoints.files import CheckpointError
from jaxq.checkpoints.opening import load, open

__all__ = ["Checkpoint", "CheckpointError", "Entry", "convert", "load", "open"]
