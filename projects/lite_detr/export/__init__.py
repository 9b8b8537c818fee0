"""Detectors in files that others can run: ONNX, ``torch.export``, AOTInductor and TorchScript."""

from ..errors import ExportError
from .model import ExportableDetector
from .onnx_file import onnx_metadata, save_onnx
from .program import compile_program, export_program, export_torchscript, save_program

__all__ = [
    "ExportError",
    "ExportableDetector",
    "compile_program",
    "export_program",
    "export_torchscript",
    "onnx_metadata",
    "save_onnx",
    "save_program",
]
