"""Read checkpoints, ours and those of other implementations, through Detectron2's checkpointer."""

from ..errors import SaveError, WeightsError
from .checkpointer import DetrCheckpointer
from .convert import Conversion, convert, convert_weights
from .files import read_weights

__all__ = [
    "Conversion",
    "DetrCheckpointer",
    "SaveError",
    "WeightsError",
    "convert",
    "convert_weights",
    "read_weights",
]
