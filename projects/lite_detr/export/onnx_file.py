"""ONNX files in standard operators alone."""

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.export import ExportedProgram

from .errors import ExportError

OPSET = 18
INPUTS = {"images": ["batch", 3, "height", "width"], "image_sizes": ["batch", 2]}
OUTPUTS = {
    "boxes": ["batch", "detections", 4],
    "scores": ["batch", "detections"],
    "classes": ["batch", "detections"],
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
            # Runtimes simplify graphs themselves, in seconds where the exporter takes minutes.
            optimize=False,
            verbose=False,
        )
    model = translated.model_proto
    for values, shapes in ((model.graph.input, INPUTS), (model.graph.output, OUTPUTS)):
        for value in values:
            name_sizes(value, shapes[value.name])
    # The exporter writes the sizes between as formulas, in which these names do not occur.
    del model.graph.value_info[:]
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    onnx.save(model, path)


def name_sizes(value, shape: list[int | str]) -> None:
    """Gives the open dimensions of an input or an output, a ``ValueInfoProto``, their names."""
    for dimension, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
        if isinstance(size, str):
            dimension.dim_param = size


def check_packages(*names: str) -> None:
    """Raises an ExportError where packages are missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"ONNX needs {' and '.join(missing)}, which {'are' if missing[1:] else 'is'} not "
            "installed: pip install 'lite-detr[export]'"
        )
