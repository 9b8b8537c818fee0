"""``torch.export``, AOTInductor and TorchScript, which keep our native operators.

All three write files that are programs. **Load them only from sources that you trust**: a compiled
package is machine code, and ``torch.export.load`` and ``torch.jit.load`` run what the file says.
"""

import contextlib
import functools
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from detectron2.export import TracingAdapter
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..checkpoint.files import atomic_open
from ..errors import ExportError
from ..labels import first_line
from ..modeling.detector import Detector
from ..ops import native
from .model import ExportableDetector, check_dtype

# Height and width of the example images; any ordinary size serves.
EXAMPLE_SIZE = (352, 416)


def export_program(detector: Detector) -> ExportedProgram:
    """Trace a detector with ``torch.export``, with batch, height and width left open.

    The program has the inputs and outputs of :class:`ExportableDetector`, on the detector's device,
    for images with at least as many tokens as the detector has queries.

    Args:
        detector: in float32; it is switched to evaluation mode.

    Raises:
        ExportError: the native operators are not built for the device, or a part of the detector,
            such as a backbone that pads internally, does something else for other sizes.
        TypeError: the weights are not in float32.
    """
    check_operators(detector.device)
    model = ExportableDetector(detector)
    height, width = EXAMPLE_SIZE
    images = torch.zeros(2, len(detector.pixel_mean), height, width, device=detector.device)
    sizes = torch.tensor([[height, width], [height - 40, width - 9]], device=detector.device)
    free = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    try:
        with torch.no_grad(), traceable_same_padding(detector):
            return torch.export.export(model, (images, sizes), dynamic_shapes=free, strict=False)
    # The exporter passes on whatever the traced code raises.
    except Exception as error:
        backbone = type(detector.backbone).__name__
        raise ExportError(
            f"{type(detector).__name__} with {backbone} cannot be exported for all image sizes "
            f"({first_line(error)}): try TorchScript, or another backbone"
        ) from error


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write a file for ``torch.export.load``, which needs ``import lite_detr.ops`` first.

    Loading the file can run any code that is in it, like unpickling.

    Raises:
        SaveError: the file cannot be written.
    """
    with atomic_open(path, "wb") as file:
        torch.export.save(program, file)


def compile_program(program: ExportedProgram, path: Path) -> None:
    """Compile a program with AOTInductor, for ``torch._inductor.aoti_load_package``.

    The package is for this machine's processor, or for its GPU if the detector was on one. It calls
    the native operators, so loading it needs ``import lite_detr.ops`` first. It is machine code:
    whoever loads it runs it.

    Raises:
        ExportError: there is no C++ compiler.
        SaveError: the file cannot be written.
    """
    # PyTorch documents AOTInductor under this private name; it has no other.
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InvalidCxxCompiler

    if not shutil.which("g++") and not shutil.which("clang++"):
        raise ExportError("AOTInductor needs a C++ compiler, and there is no g++ or clang++")
    # The compiler keeps its own files in a cache; a package is then written to the path given.
    with tempfile.TemporaryDirectory() as folder:
        try:
            package = aoti_compile_and_package(program, package_path=f"{folder}/package.pt2")
        except InvalidCxxCompiler as error:
            raise ExportError(f"AOTInductor needs a C++ compiler: {first_line(error)}") from error
        with open(package, "rb") as source, atomic_open(path, "wb") as file:
            shutil.copyfileobj(source, file)


def export_torchscript(detector: Detector, path: Path) -> None:
    """Trace a detector for one image ``[3, H, W]`` of any size at a time.

    Detectron2's ``tools/deploy/export_model.py`` does the same. The file returns a tuple, in the
    order in which Detectron2's ``TracingAdapter`` flattens ``Instances``: boxes ``[N, 4]``, classes
    ``[N]`` and scores ``[N]``, best first, and the image's height and width. Loading it needs
    ``import lite_detr.ops`` first, for the native operators, and runs the program in it.

    Args:
        detector: in float32; it is switched to evaluation mode.
        path: of the file.

    Raises:
        ExportError: the native operators are not built for the detector's device.
        TypeError: the weights are not in float32.
        SaveError: the file cannot be written.
    """
    check_operators(detector.device)
    check_dtype(detector)
    image = torch.zeros(3, *EXAMPLE_SIZE, device=detector.device)
    adapter = TracingAdapter(detector.eval(), [{"image": image}])
    with warnings.catch_warnings():
        # About checks of shapes, which come out the same for all images, and TorchScript's age.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(adapter, (image,), check_trace=False)
        with atomic_open(path, "wb") as file:
            torch.jit.save(traced, file)


def check_operators(device: torch.device) -> None:
    """Check that the native operators are available on a device.

    The operators in PyTorch read the sizes of maps as numbers, which would be constants of a trace.

    Raises:
        ExportError: they are not.
    """
    if not native.runs_on(device):
        raise ExportError(
            f"exports are traced with the native operators, and there are none for {device} ("
            f"{native.MISSING_REASON or 'the extension has no kernels for it'}): docs/kernels.md "
            "says how to build them"
        )


@contextlib.contextmanager
def traceable_same_padding(model: nn.Module) -> Iterator[None]:
    """Let a model's convolutions from timm that pad to the same size pad by :func:`pad_same`.

    timm rounds up and takes a maximum, layer after layer of the result before, which gives formulas
    of sizes that a tracer cannot simplify.
    """
    try:
        from timm.layers import Conv2dSame
    except ModuleNotFoundError:  # timm is an optional dependency.
        yield
        return
    convolutions = [module for module in model.modules() if isinstance(module, Conv2dSame)]
    for convolution in convolutions:
        convolution.forward = functools.partial(convolve_same, convolution)
    try:
        yield
    finally:
        for convolution in convolutions:
            del convolution.forward


def convolve_same(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a convolution ``[B, C, H, W]`` whose output has ``H`` and ``W`` over the stride."""
    x = pad_same(x, convolution.kernel_size, convolution.stride, convolution.dilation)
    weight, bias = convolution.weight, convolution.bias
    return F.conv2d(
        x, weight, bias, convolution.stride, 0, convolution.dilation, convolution.groups
    )


def pad_same(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Pad ``[B, C, H, W]`` so that a convolution gives ``H`` and ``W`` by stride, rounded up.

    At the top and left the padding is timm's. At the bottom and right it may be larger, which no
    output sees, so that the sum is the same for every size.
    """
    padding = []
    for axis in (1, 0):  # F.pad starts with the last axis.
        reach = (kernel_size[axis] - 1) * dilation[axis]
        last = x.shape[2 + axis] - 1
        # The remainder of a division, without an operator that shape inference of ONNX lacks.
        needed = reach - (last - last // stride[axis] * stride[axis])
        before = needed // 2 if reach + 1 >= stride[axis] else max(needed, 0) // 2
        padding += [before, reach - before]
    return F.pad(x, padding)
