"""OpenVINO's model files, made from ONNX files, with the same inputs, outputs and metadata."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ExportError, SaveError
from ..modeling.postprocessing import Detections
from .check import split_batch
from .onnx_file import OUTPUTS, check_packages

# Where a model's runtime information has our metadata.
SECTION = "lite_detr"
# Hints of the type to compute in, and what a device that has it says that it can do.
PRECISIONS = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}


def save_openvino(onnx_file: Path, path: Path, metadata: Mapping[str, str]) -> None:
    """Convert an ONNX file to OpenVINO's format; types of weights stay as they are.

    Args:
        onnx_file: from :func:`save_onnx`.
        path: ends in ``.xml``; beside it comes a file in ``.bin``, which holds the weights.
        metadata: see :func:`onnx_metadata`; it goes into the model's ``rt_info``, under
            ``lite_detr``.

    Raises:
        ExportError: the package ``openvino`` is not installed.
        SaveError: the files cannot be written.
    """
    check_packages("openvino", extra="openvino")
    import openvino

    model = openvino.convert_model(onnx_file)
    for key, value in metadata.items():
        model.set_rt_info(value, [SECTION, key])
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder, path.name)
            openvino.save_model(model, written, compress_to_fp16=False)
            # The weights first: a file in .xml without them would be taken for a model.
            for suffix in (".bin", ".xml"):
                os.replace(written.with_suffix(suffix), path.with_suffix(suffix))
    except (OSError, RuntimeError) as error:
        raise SaveError(f"{path} cannot be written: {error}") from error


class OpenvinoFile:
    """A model file that OpenVINO runs on the CPU, with its ranking of the proposals.

    It runs as :class:`~lite_detr.export.check.OnnxFile` does.

    Args:
        path: of the file in ``.xml``.
        threads: the number of threads; 0 uses one per core.
        precision: ``f32``, ``bf16`` or ``f16``, the type that OpenVINO may compute in, whatever the
            type of the weights.

    Raises:
        ExportError: the processor does not compute in it.
    """

    def __init__(self, path: Path, threads: int = 0, precision: str = "f32"):
        import openvino

        self.path = path
        core = openvino.Core()
        able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if PRECISIONS[precision] not in able:
            found = ", ".join(name for name, word in PRECISIONS.items() if word in able)
            raise ExportError(f"precision is {precision}; OpenVINO computes here in {found}")
        model = core.read_model(path)
        # The last TopK chooses the detections; the one before it chooses the proposals, if any.
        *choices, _ = (op for op in model.get_ordered_ops() if op.get_type_name() == "TopK")
        self.has_proposals = bool(choices)
        model.add_outputs([choice.output(1) for choice in choices])
        # Without the hint, processors that have it would compute in bfloat16.
        options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        self.compiled = core.compile_model(model, "CPU", options)

    def run(self, images: Tensor, sizes: Tensor) -> tuple[list[Detections], Tensor | None]:
        """
        Args:
            images: ``[B, 3, H, W]``
            sizes: ``[B, 2]``

        Returns:
            The detections of each image, and the tokens ``[B, Q]`` of the proposals, best first.
        """
        results = self.compiled({"images": images.numpy(), "image_sizes": sizes.numpy()})
        found = [torch.from_numpy(results[name].copy()) for name in OUTPUTS]
        order = None
        if self.has_proposals:
            order = torch.from_numpy(results[len(results) - 1].copy()).long()
        return list(split_batch(*found)), order
