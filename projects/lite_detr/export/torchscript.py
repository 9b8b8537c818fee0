"""TorchScript by tracing, as Detectron2's ``tools/deploy/export_model.py`` does it."""

import warnings
from pathlib import Path

import torch
from detectron2.export import TracingAdapter

from ..modeling.detector import Detector
from .program import EXAMPLE_SIZE, check_operators


def export_torchscript(detector: Detector, path: Path) -> None:
    """Traces a detector for one image ``[3, H, W]`` of any size at a time.

    The file gives a tuple as Detectron2's ``TracingAdapter`` flattens ``Instances``: boxes
    ``[N, 4]``, classes ``[N]`` and scores ``[N]``, best first, and the image's height and width.
    ``lite_detr``, which has the native operators, is to be imported before it is loaded.

    Args:
        detector: it is put into evaluation mode.

    Raises:
        ExportError: the native operators are not built for the detector's device.
    """
    check_operators(detector.device)
    image = torch.zeros(3, *EXAMPLE_SIZE, device=detector.device)
    adapter = TracingAdapter(detector.eval(), [{"image": image}])
    with warnings.catch_warnings():
        # Of checks on shapes, whose outcome is the same for all images, and of TorchScript's age.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(adapter, (image,), check_trace=False)
        torch.jit.save(traced, path)
