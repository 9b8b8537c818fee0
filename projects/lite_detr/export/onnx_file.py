"""ONNX files in standard operators alone."""

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.export import ExportedProgram

from ..errors import ExportError

OPSET = 18
# Types and shapes by name; a size with a name is open.
INPUTS = {
    "images": ("FLOAT", ["batch", 3, "height", "width"]),
    "image_sizes": ("INT64", ["batch", 2]),
}
OUTPUTS = {
    "boxes": ("FLOAT", ["batch", "detections", 4]),
    "scores": ("FLOAT", ["batch", "detections"]),
    "classes": ("INT64", ["batch", "detections"]),
}


def save_onnx(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Translates a program, and writes a file that ``onnx.checker`` has passed.

    Inputs and outputs are those of :class:`ExportableDetector`: ``images`` and ``image_sizes``,
    ``boxes``, ``scores`` and ``classes``. Batch, height and width are open.

    Args:
        program: of :func:`export_program`, on the CPU.
        path: of the file.
        metadata: goes into the file's ``metadata_props``.

    Raises:
        ExportError: the packages ``onnx`` and ``onnxscript`` are not installed.
    """
    check_packages("onnx", "onnxscript")
    import onnx

    from .onnx_operators import translations

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        translated = torch.onnx.export(
            program,
            (),
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            custom_translation_table=translations(),
            dynamo=True,
            # It takes minutes; what simplify does, and runtimes do, takes seconds.
            optimize=False,
            verbose=False,
        )
    simplify(translated.model)
    model = translated.model_proto
    # The exporter writes sizes as formulas.
    del model.graph.value_info[:]
    for values, kinds in ((model.graph.input, INPUTS), (model.graph.output, OUTPUTS)):
        for value in values:
            kind, shape = kinds[value.name]
            kind = onnx.TensorProto.DataType.Value(kind)
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shape))
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    onnx.save(model, path)


def simplify(model) -> None:
    """Computes what is constant, and what is there more than once, in a ``onnx_ir.Model``."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    fold_constants(model)
    remove_unused_nodes(model)
    CommonSubexpressionEliminationPass()(model)
    remove_unused_nodes(model)


def check_packages(*names: str) -> None:
    """Raises an ExportError where packages are missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"ONNX needs {' and '.join(missing)}, which {'are' if missing[1:] else 'is'} not "
            "installed: pip install 'lite-detr[export]'"
        )
