"""Make a trained detector faster without changing its results."""

import copy
import ctypes
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..errors import OptimizationError
from ..modeling.detector import Detector
from ..modeling.inputs import batch_images
from ..modeling.layers import MLP, FeedForward
from ..modeling.queries import ProposalQueries
from ..modeling.scales import Scales
from .fold_norms import fold_norms

logger = logging.getLogger("lite_detr")

# By the names that programs give them.
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
# The parts whose work depends on nothing but the shapes of their inputs.
COMPILED_PARTS = ("backbone", "neck", "encoder", "decoder")
# The image shapes whose geometry is kept; at 800x1066 pixels, each image takes 18 MiB in float32.
MAX_KEPT = 8
# Numbers of mallopt's parameters, from malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def optimize_for_inference(
    model: Detector, dtype: torch.dtype | None = None, compile: bool = False
) -> Detector:
    """Return a copy of a detector that is only to be run: same contract and results, but faster.

    - Batch norms of the backbone are folded into its convolutions.
    - On CPUs, and on GPUs with 16 bits, convolutions compute with channels last.
    - Position encodings and reference points are kept for the latest image shapes.
    - Activations overwrite their inputs.
    - On request, weights have 16 bits. Scores and boxes, including those of the two-stage queries,
      stay float32.

    docs/inference.md says what each step gains. On a CPU, also call :func:`keep_freed_memory`.

    Args:
        model: trained, in float32, on the device that it is to run on.
        dtype: of the weights, ``torch.bfloat16`` or, on a GPU, ``torch.float16``; None or
            ``torch.float32`` leaves them as they are.
        compile: compile backbone, neck, encoder and decoder with ``torch.compile``, at the first
            image and at some new image shapes. On a CPU this needs a C++ compiler, and the weights
            must not change any more.

    Raises:
        TypeError: the model is not a detector of this package, or its weights are not in float32.
        ValueError: ``dtype`` is none of these.
        OptimizationError: the model's device does not compute in ``dtype``, or the backbone's norms
            cannot be folded, see :func:`fold_norms`.
    """
    if not isinstance(model, Detector):
        raise TypeError(
            f"optimize_for_inference takes a detector of lite_detr, got {type(model).__name__}"
            + (": give its .module" if hasattr(model, "module") else "")
        )
    found = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if found:
        raise TypeError(
            f"optimize_for_inference takes weights in torch.float32, got {found.pop()}: give the "
            "detector as it was trained"
        )
    dtype = dtype or torch.float32
    if dtype not in DTYPES.values():
        accepted = ", ".join(map(str, DTYPES.values()))
        raise ValueError(f"dtype is {dtype}, accepted are {accepted} and None")
    optimized = copy.deepcopy(model).eval().requires_grad_(False)
    num_folded = fold_backbone_norms(optimized)
    overwrite_activations(optimized)
    if dtype != torch.float32:
        cast_to_16_bits(optimized, dtype)
    if optimized.device.type == "cpu" or dtype != torch.float32:
        use_channels_last(optimized)
    keep_geometry(optimized)
    if compile:
        compile_parts(optimized)
    logger.info(
        "optimized for inference: %d batch norms folded, weights in %s%s",
        num_folded,
        str(dtype).removeprefix("torch."),
        ", compiled" if compile else "",
    )
    return optimized


def optimize_for_program(model: Detector, dtype: str) -> Detector:
    """As :func:`optimize_for_inference`, in a process that does nothing but run the model.

    On a CPU this also keeps freed memory.

    Args:
        model: see :func:`optimize_for_inference`.
        dtype: one of the names in ``DTYPES``.
    """
    if model.device.type == "cpu":
        keep_freed_memory()
    return optimize_for_inference(model, DTYPES[dtype])


def fold_backbone_norms(detector: Detector) -> int:
    """Fold the backbone's batch norms into its convolutions; return their number."""
    backbone = detector.backbone
    noise = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    image = batch_images([noise.to(detector.device)], backbone).tensor
    return fold_norms(backbone, lambda: backbone(image))


def overwrite_activations(detector: Detector) -> None:
    """Let ReLUs overwrite outputs of linear layers, which nothing else needs without gradients."""
    for module in detector.modules():
        if isinstance(module, (FeedForward, MLP)):
            for child in module.children():
                if isinstance(child, nn.ReLU):
                    child.inplace = True


def use_channels_last(detector: Detector) -> None:
    """Put convolution weights into the layout in which tokens are: channels last."""
    for part in (detector.backbone, detector.neck):
        part.to(memory_format=torch.channels_last)


def compile_parts(detector: Detector) -> None:
    """Compile each part by itself, as the code between them depends on values."""
    options = compiler_options(detector.device)
    for name in COMPILED_PARTS:
        part = getattr(detector, name)
        # Not the module itself, whose hooks would be compiled with it.
        part.forward = torch.compile(part.forward, options=options)


def compiler_options(device: torch.device) -> dict[str, bool]:
    """Return what ``torch.compile`` is to do with a part that is only run."""
    # Weights that are constants are put into the order of oneDNN's products once, and ReLUs and
    # sums become parts of products. GPUs have no such order.
    return {"freezing": device.type == "cpu"}


def keep_geometry(detector: Detector) -> None:
    """Compute the geometry of tokens, which depends on image shapes alone, once for a shape."""
    detector.locate_tokens = GeometryCache(detector.locate_tokens)


class GeometryCache:
    """The ``locate_tokens`` of a detector whose weights no longer change, with a cache.

    Threads may share it, and so the detector. A copy starts with an empty cache.

    Args:
        compute: the method, called for new shapes.
    """

    def __init__(self, compute: Callable[[list[Tensor], ImageList], tuple[Tensor, Scales]]):
        self.compute = compute
        self.kept: OrderedDict[tuple, tuple[Tensor, Scales]] = OrderedDict()
        self.lock = threading.Lock()

    def __reduce__(self):
        return type(self), (self.compute,)

    def __call__(self, maps: list[Tensor], images: ImageList) -> tuple[Tensor, Scales]:
        """See :meth:`Detector.locate_tokens`."""
        if (
            # A kept value would be a constant of the trace, and a traced one is no value.
            torch.jit.is_tracing()
            or torch.compiler.is_compiling()
            # Exports pass the sizes as a tensor, whose values would have to be read.
            or isinstance(images.image_sizes, Tensor)
        ):
            return self.compute(maps, images)
        key = self.key(maps, images)
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
        # Threads that meet the same new shape compute the same value, each for itself.
        located = self.compute(maps, images)
        with self.lock:
            self.kept[key] = located
            if len(self.kept) > MAX_KEPT:
                self.kept.popitem(last=False)
        return located

    @staticmethod
    def key(maps: list[Tensor], images: ImageList) -> tuple:
        """Return all that the result depends on, and the stream that writes it on a GPU."""
        device = maps[0].device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return (
            tuple(map(tuple, images.image_sizes)),
            tuple(images.tensor.shape),
            tuple(tuple(feature_map.shape) for feature_map in maps),
            maps[0].dtype,
            device,
            stream,
            # A value made in inference mode cannot be used where gradients are recorded.
            torch.is_inference_mode_enabled(),
        )


def cast_to_16_bits(detector: Detector, dtype: torch.dtype) -> None:
    """Cast a detector's weights, all but its heads, in place.

    The scores of the two-stage queries decide which proposals become queries, and boxes add up over
    layers: 8 bits of mantissa separate neither close scores nor neighbouring pixels. Pixels are
    normalised in float32, and geometry is always float32.

    Args:
        detector: in float32; it is changed.
        dtype: ``torch.bfloat16``, or on a GPU ``torch.float16``.

    Raises:
        OptimizationError: a CPU does not compute in the dtype.
    """
    if detector.device.type == "cpu":
        if dtype == torch.float16:
            raise OptimizationError(
                "CPUs do not compute in float16: give bfloat16 or float32, or move the detector to "
                "a GPU first"
            )
        if not cpu_computes_in(dtype):
            logger.warning(
                "this CPU has no arithmetic for bfloat16 (AVX-512 or AMX): results are right, but "
                "take many times as long as in float32"
            )
    exact = wrap_heads(detector)
    exact.append(detector.pixel_mean)
    exact.append(detector.pixel_std)
    kept = {id(tensor) for tensor in exact}
    for module in detector.modules():
        for tensors in (module.parameters(recurse=False), module.buffers(recurse=False)):
            for tensor in tensors:
                if tensor.is_floating_point() and id(tensor) not in kept:
                    tensor.data = tensor.data.to(dtype)


def cpu_computes_in(dtype: torch.dtype) -> bool:
    """Return True if this CPU has arithmetic for a dtype. Not for float16, which none has.

    For bfloat16 that is AVX-512 or AMX. Also true if PyTorch cannot tell.
    """
    # A private name: PyTorch has no public one. Builds without oneDNN lack it.
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return dtype != torch.bfloat16 or is_supported is None or is_supported()


def wrap_heads(detector: Detector) -> list[Tensor]:
    """Put a cast to float32 before each head; return the heads' parameters, which stay float32."""
    decoder_heads = detector.decoder.heads
    lists = [decoder_heads.class_embed, decoder_heads.bbox_embed]
    for heads in lists:
        for index, head in enumerate(heads):
            heads[index] = Float32Head(head)
    queries = detector.queries
    if isinstance(queries, ProposalQueries):
        queries.class_embed = Float32Head(queries.class_embed)
        queries.bbox_embed = Float32Head(queries.bbox_embed)
        lists += [queries.class_embed, queries.bbox_embed]
    return [parameter for heads in lists for parameter in heads.parameters()]


class Float32Head(nn.Module):
    """A head with float32 weights that accepts queries of any dtype.

    Args:
        head: in float32.
    """

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, queries: Tensor) -> Tensor:
        """``[B, Q, C]`` of any dtype -> ``[B, Q, *]`` in float32."""
        return self.head(queries.float())


def keep_freed_memory() -> bool:
    """Let the process keep the memory that it frees, for its next allocations.

    glibc returns blocks of many MiB to the system at every free, and the kernel then fills each new
    block with zeros, page by page. With this, the process keeps its peak memory until it ends. Call
    it before the first image; it applies to the whole process.

    Returns:
        Whether the C library supports it; those other than glibc stay as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        logger.info("freed memory is returned to the system: the C library is not glibc")
        return False
    # No block is mapped by itself, and the heap's end is never returned.
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
