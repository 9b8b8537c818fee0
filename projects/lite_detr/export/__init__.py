"""Detectors in files that others can run: ONNX, ``torch.export``, AOTInductor and TorchScript."""

from ..errors import ExportError
from .model import ExportableDetector
from .onnx_file import save_onnx
from .program import compile_program, export_program, save_program
from .torchscript import export_torchscript

__all__ = [
    "ExportError",
    "ExportableDetector",
    "compile_program",
    "export_program",
    "export_torchscript",
    "save_onnx",
    "save_program",
]
