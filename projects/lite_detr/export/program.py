"""``torch.export`` and AOTInductor, which keep our native operators."""

import shutil
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from ..errors import ExportError
from ..modeling.detector import Detector
from ..ops import native
from .model import ExportableDetector
from .same_padding import traceable_same_padding

# Height and width of the images that are traced with; any but those that are special will do.
EXAMPLE_SIZE = (352, 416)


def export_program(detector: Detector) -> ExportedProgram:
    """Traces a detector, with batch, height and width left open.

    The program takes and gives what :class:`ExportableDetector` does, on the detector's device,
    for images with at least as many tokens as the detector has queries.

    Args:
        detector: in float32; it is put into evaluation mode.

    Raises:
        ExportError: the native operators are not built for the device, or a part of the detector,
            such as a backbone that pads within itself, does something else for other sizes.
        TypeError: the weights are not in float32.
    """
    check_operators(detector.device)
    model = ExportableDetector(detector)
    height, width = EXAMPLE_SIZE
    images = torch.zeros(2, len(detector.pixel_mean), height, width, device=detector.device)
    sizes = torch.tensor([[height, width], [height - 40, width - 9]], device=detector.device)
    free = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    try:
        with torch.no_grad(), traceable_same_padding():
            return torch.export.export(model, (images, sizes), dynamic_shapes=free, strict=False)
    # The exporter passes on whatever the code that it traces raises.
    except Exception as error:
        backbone = type(detector.backbone).__name__
        raise ExportError(
            f"{type(detector).__name__} with {backbone} cannot be exported for all sizes of "
            f"images ({first_line(error)}); TorchScript may do, or another backbone"
        ) from error


def save_program(program: ExportedProgram, path: Path) -> None:
    """Writes what ``torch.export.load`` reads, once ``lite_detr`` is imported."""
    torch.export.save(program, path)


def compile_program(program: ExportedProgram, path: Path) -> None:
    """Compiles a program by AOTInductor into a package for ``torch._inductor.aoti_load_package``.

    It is for the machine's processor, or for its GPU where the detector was on one, and calls the
    native operators: ``lite_detr`` is to be imported before it is loaded.

    Raises:
        ExportError: there is no C++ compiler.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InvalidCxxCompiler

    if not shutil.which("g++") and not shutil.which("clang++"):
        raise ExportError("AOTInductor needs a C++ compiler, and there is no g++ or clang++")
    try:
        aoti_compile_and_package(program, package_path=str(path))
    except InvalidCxxCompiler as error:
        raise ExportError(f"AOTInductor needs a C++ compiler: {first_line(error)}") from error


def check_operators(device: torch.device) -> None:
    """Raises an ExportError where the native operators are not at hand.

    Those in PyTorch ask for the sizes of maps as numbers, which a trace would keep.
    """
    if not native.runs_on(device):
        raise ExportError(
            f"exports are traced with the native operators, and there are none for {device} "
            f"({native.WHY_NOT or 'the extension has no kernels for it'}): docs/kernels.md says "
            "how to build them"
        )


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
