"""ONNX files in standard operators alone, and the metadata in them."""

import importlib.util
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from detectron2.config import instantiate
from detectron2.data.transforms import ResizeShortestEdge
from omegaconf import DictConfig
from PIL import Image
from torch.export import ExportedProgram

from ..checkpoint.files import atomic_open
from ..data.coco import class_metadata
from ..errors import ExportError
from ..version import __version__

# The opset of a file unless another is asked for, and those that exist here. GridSample comes with
# opset 16.
OPSET, OPSETS = 18, range(16, 24)
DTYPES = ("float32", "float16", "float16-decoder")
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
CHANNEL_ORDERS = ("RGB", "BGR")


def save_onnx(
    program: ExportedProgram,
    path: Path,
    metadata: Mapping[str, str],
    opset: int = OPSET,
    dtype: str = "float32",
) -> None:
    """Translate a program, and write a file that passes ``onnx.checker``.

    Inputs and outputs are those of :class:`ExportableDetector`: ``images`` and ``image_sizes``,
    ``boxes``, ``scores`` and ``classes``. Batch, height and width are open.

    Args:
        program: from :func:`export_program`, on the CPU.
        path: of the file.
        metadata: for the file's ``metadata_props``, see :func:`onnx_metadata`.
        opset: version of the standard operators, 16 to 23. Below 17, layer norms become several
            operators.
        dtype: of the weights, float32 or float16, or float16-decoder for float16 after the choice
            of proposals alone. Geometry and scores stay in float32, see
            :mod:`lite_detr.export.onnx_half`, as do inputs and outputs.

    Raises:
        ExportError: the packages ``onnx`` and ``onnxscript`` are not installed.
        SaveError: the file cannot be written.
        ValueError: the opset or the type is not one of those accepted.
    """
    if opset not in OPSETS:
        raise ValueError(f"opset is {opset}, accepted are {OPSETS[0]} to {OPSETS[-1]}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, accepted are {', '.join(DTYPES)}")
    check_packages("onnx", "onnxscript")
    import onnx

    from .onnx_half import convert_to_half
    from .onnx_operators import translations
    from .onnx_rewrites import convert_opset, make_convertible, simplify

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
            # This takes minutes; simplify() and the runtimes take seconds.
            optimize=False,
            verbose=False,
        )
    simplify(translated.model)
    model = translated.model_proto
    make_convertible(model)
    for values, kinds in ((model.graph.input, INPUTS), (model.graph.output, OUTPUTS)):
        for value in values:
            kind, shape = kinds[value.name]
            kind = onnx.TensorProto.DataType.Value(kind)
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shape))
    if dtype != "float32":
        convert_to_half(model, decoder_only=dtype == "float16-decoder")
    model = convert_opset(model, opset)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    with atomic_open(path, "wb") as file:
        file.write(model.SerializeToString())


def check_packages(*names: str, extra: str = "export") -> None:
    """Check that packages are installed, which an extra of ours installs.

    Raises:
        ExportError: some are not.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"the format needs {' and '.join(missing)}, which {'are' if missing[1:] else 'is'} not "
            f"installed: pip install 'lite-detr[{extra}]'"
        )


def onnx_metadata(
    cfg: DictConfig, config_name: str, trained: Sequence[str] | None = None
) -> dict[str, str]:
    """Return what an ONNX file must tell its users besides the graph, as texts by name.

    ``class_names`` is a list in JSON, empty if they are unknown. ``preprocessing`` is an object in
    JSON: ``channels`` ("RGB" or "BGR"), and ``resize``, which is null or has ``short_side`` and
    ``max_size`` in pixels. ``config`` and ``lite_detr_version`` say what wrote the file.

    Args:
        cfg: the detector's lazy config.
        config_name: the config's name, as it was given.
        trained: the names of the classes in its weights, see :func:`class_metadata`.

    Raises:
        ExportError: the test set's images are changed by anything but one ``ResizeShortestEdge``,
            or their channels are neither RGB nor BGR.
    """
    mapper = cfg.dataloader.test.mapper
    if mapper.image_format not in CHANNEL_ORDERS:
        raise ExportError(
            f"dataloader.test.mapper.image_format is {mapper.image_format}; an ONNX file's images "
            f"are {' or '.join(CHANNEL_ORDERS)}"
        )
    classes = class_metadata(cfg, trained)
    names = list(classes.thing_classes) if classes else []
    return {
        "class_names": json.dumps(names, ensure_ascii=False),
        "preprocessing": json.dumps(
            {"channels": mapper.image_format, "resize": resizing(mapper.augmentations)}
        ),
        "config": config_name,
        "lite_detr_version": __version__,
    }


def resizing(augmentations: list[DictConfig]) -> dict[str, int] | None:
    """Return how a test set's images are resized, for :func:`onnx_metadata`."""
    found = [instantiate(augmentation) for augmentation in augmentations]
    if not found:
        return None
    [resize] = found if len(found) == 1 else [None]
    if (
        not isinstance(resize, ResizeShortestEdge)
        or resize.interp != Image.BILINEAR
        or len(set(resize.short_edge_length)) != 1
    ):
        raise ExportError(
            "dataloader.test.mapper.augmentations holds "
            f"{', '.join(type(augmentation).__name__ for augmentation in found)}; an ONNX file "
            "can describe one bilinear ResizeShortestEdge of one length, or nothing"
        )
    return {"short_side": resize.short_edge_length[0], "max_size": resize.max_size}
