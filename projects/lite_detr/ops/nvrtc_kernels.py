"""The CUDA kernels as NVRTC compiles them: their instances, and their arguments in Python.

The structs and limits are those of ``kernels/cuda/kernels.h``. Each program checks the limits and
the size of its argument.
"""

import ctypes
import functools
import re
from typing import NamedTuple

import torch
from torch import Tensor

from . import nvrtc

LEVELS, GRID, ITEMS = 32, 65535, 2**31 - 1 - 256
HEAD_WIDTHS = (16, 32, 64, 128, 256)
VECTOR_BYTES = 16
TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "lite_detr::Float16",
    torch.bfloat16: "lite_detr::BFloat16",
}


def structure(name: str, **fields: type) -> type[ctypes.Structure]:
    """Return a struct of C, as ``kernels/cuda/kernels.h`` has it."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


POINTER, INT, LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
KernelGeometry = structure(
    "KernelGeometry",
    **dict.fromkeys("batch queries heads channels points levels query_level".split(), INT),
    **dict.fromkeys("height width start".split(), INT * LEVELS),
)
TokenRows = structure(
    "TokenRows", data=POINTER, batch_stride=LONG, head_stride=LONG, token_stride=INT
)
# The fields of each kernel's argument, in order.
FIELDS = {
    "msda_forward": "geometry value points weights output",
    "msda_backward": "geometry value points weights output grad_output grad_value grad_weights",
    "key_aware_forward": "geometry value key query points scale output logsumexp",
    "key_aware_backward": "geometry value key query points scale output logsumexp grad_output "
    "grad_value grad_key grad_query",
}


class Kernel(NamedTuple):
    """An instance of a kernel.

    Args:
        name: one of `FIELDS`.
        points: ``Locations`` or ``Offsets``, how points are given.
        shared: whether the values are the keys; None for kernels without keys.
    """

    name: str
    dtype: torch.dtype
    points: str
    head_width: int
    shared: bool | None = None

    @property
    def struct(self) -> str:
        """The name of the argument's type without its parameters; that of the layout ends so."""
        return "".join(word.capitalize() for word in self.name.split("_"))

    def argument(self) -> type[ctypes.Structure]:
        return argument_type(self.name, self.points, compute_dtype(self.dtype))

    def program(self) -> nvrtc.Program:
        """Return the program that instantiates the kernel, if the structs have the same size.

        Its second expression names what :class:`Loaded` tells of a launch.
        """
        number = TYPES[self.dtype]
        arguments = f"{self.struct}<{number}, {self.points}<{number}>>"
        file = f"cuda/{self.name.rsplit('_', 1)[0]}.cuh"
        source = (
            f'#include "{file}"\nnamespace lite_detr::cuda {{\n'
            f"static_assert(kMaxLevels == {LEVELS} && kMaxGrid == {GRID});\n"
            f"static_assert(kMaxItems == {ITEMS});\n"
            f"using Arguments = {arguments};\n"
            f"static_assert(sizeof(Arguments) == {ctypes.sizeof(self.argument())});\n"
            "template <int kLanes, int kThreads, int kFew, int kSmall>\n"
            "__global__ void launch_layout() {}\n}\n"
        )
        key = () if self.shared is None else (str(self.shared).lower(),)
        instance = ", ".join(
            [number, f"lite_detr::{self.points}<{number}>", str(self.head_width), *key]
        )
        layout = f"k{self.struct}<{', '.join([number, str(self.head_width), *key])}>"
        space = "lite_detr::cuda::"
        launch = (
            f"{space}{layout}.lanes, {space}{layout}.threads, {space}kBlocksOfASmallGrid, "
            f"{space}kSmallBlock"
        )
        return nvrtc.Program(
            f"kernels/{file}",
            source,
            (
                f"lite_detr::cuda::{self.name}<{instance}>",
                f"{space}launch_layout<{launch}>",
            ),
        )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of locations and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def argument_type(name: str, points: str, exact: torch.dtype) -> type[ctypes.Structure]:
    real = ctypes.c_double if exact == torch.float64 else ctypes.c_float
    point_types = {
        "Locations": dict(locations=POINTER, gradient=POINTER),
        "Offsets": dict(
            references=POINTER,
            coordinates=INT,
            step=real,
            offsets=POINTER,
            gradient=POINTER,
            grad_positions=POINTER,
        ),
    }
    types = dict.fromkeys(("value", "key", "grad_value", "grad_key"), TokenRows)
    types |= dict(geometry=KernelGeometry, points=structure(points, **point_types[points]))
    types |= dict(scale=real)
    return structure(name, **{field: types.get(field, POINTER) for field in FIELDS[name].split()})


class Loaded(NamedTuple):
    """A kernel on a device, and how to launch it.

    Attributes:
        lanes: of a group, which works for one query and head.
        threads: of a block.
        few: a grid of fewer blocks takes small ones.
        small: the threads of a small block.
    """

    function: object
    lanes: int
    threads: int
    few: int
    small: int

    def grid(self, geometry: ctypes.Structure) -> tuple[tuple[int, int, int], int]:
        """Return the blocks of a launch, and the threads of each."""
        for threads in (self.threads, self.small):
            blocks = count_blocks(geometry, threads // self.lanes)
            if blocks * geometry.heads * geometry.batch >= self.few:
                break
        return (blocks, geometry.heads, geometry.batch), threads


def tile_size(groups: int) -> tuple[int, int]:
    """Return height and width of a tile of a power of two of cells, as ``Tile`` in lanes.cuh."""
    bits = groups.bit_length() - 1
    return 1 << bits // 2, 1 << bits - bits // 2


def count_blocks(geometry: ctypes.Structure, groups: int) -> int:
    """Return the blocks of a head and image: tiles of maps if the queries are their tokens."""
    if geometry.query_level == geometry.levels:
        return -(-geometry.queries // groups)
    height, width = tile_size(groups)
    levels = range(geometry.query_level, geometry.levels)
    return sum(
        -(-geometry.height[level] // height) * -(-geometry.width[level] // width)
        for level in levels
    )


@functools.cache
def load(kernel: Kernel, device: int) -> Loaded:
    """Compile a kernel, or take it from the cache, and load it to a device.

    Raises:
        Unavailable: it cannot be compiled or loaded.
    """
    function, names = nvrtc.load(kernel.program(), device)
    # The compiler's name of an instance spells out its parameters.
    numbers = re.search(r"launch_layoutI((?:Li\d+E)+)", names[1])[1]
    return Loaded(function, *map(int, re.findall(r"\d+", numbers)))


@functools.cache
def kernels(
    attention: str, fused: bool, dtype: torch.dtype, channels: int, shared: bool | None
) -> tuple[Kernel, Kernel]:
    """Return the forward and the backward kernel of an attention, ``msda`` or ``key_aware``.

    Raises:
        ValueError: there are none for heads as wide.
    """
    points = "Offsets" if fused else "Locations"
    width = head_width(channels, dtype)
    forward = Kernel(f"{attention}_forward", dtype, points, width, shared)
    return forward, forward._replace(name=f"{attention}_backward")


def head_width(channels: int, dtype: torch.dtype) -> int:
    """Return the width that heads of ``channels`` are padded to."""
    for width in HEAD_WIDTHS:
        # A row of float64 is loaded by a whole warp or more.
        if width >= channels and (width >= 32 or dtype != torch.float64):
            return width
    raise ValueError(
        f"the CUDA kernels take heads of up to {HEAD_WIDTHS[-1]} channels, got {channels}. "
        "Use more heads, or call the *_pytorch forms of lite_detr.ops"
    )


@functools.lru_cache(maxsize=1024)
def make_geometry(
    batch: int,
    queries: int,
    heads: int,
    width: int,
    points: int,
    sizes: tuple[tuple[int, int], ...],
) -> ctypes.Structure:
    """Return the geometry of a call; calls of equal sizes share one.

    Raises:
        ValueError: a launch has no room for it.
    """
    if len(sizes) > LEVELS:
        raise ValueError(
            f"the CUDA kernels take up to {LEVELS} levels, got {len(sizes)}. Call the *_pytorch "
            "forms of lite_detr.ops"
        )
    if batch > GRID or heads > GRID:
        raise ValueError(
            f"the CUDA kernels take up to {GRID} images and heads, got {batch} images and {heads} "
            "heads. Split the batch"
        )
    if queries > ITEMS or batch * heads * queries > ITEMS:
        raise ValueError(
            f"the CUDA kernels take up to {ITEMS} queries, counted for each head and image, got "
            f"{batch} x {heads} x {queries}. Split the batch"
        )
    if len(sizes) * points > ITEMS:
        raise ValueError(
            f"the CUDA kernels take up to {ITEMS} points of a query, got {len(sizes) * points}. "
            "Call the *_pytorch forms of lite_detr.ops"
        )
    # The queries are the tokens of this level and those after it, as in kernels/cuda/kernels.h.
    sums = [sum(h * w for h, w in sizes[level:]) for level in range(len(sizes))]
    query_level = sums.index(queries) if queries in sums else len(sizes)
    geometry = KernelGeometry(batch, queries, heads, width, points, len(sizes), query_level)
    start = 0
    for level, (height, level_width) in enumerate(sizes):
        geometry.height[level], geometry.width[level] = height, level_width
        geometry.start[level] = start
        start += height * level_width
    return geometry


def pointers(**tensors: Tensor | None) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}


def token_rows(tensor: Tensor | None) -> ctypes.Structure:
    if tensor is None:
        return TokenRows()
    images, tokens, heads = (stride * tensor.element_size() for stride in tensor.stride()[:3])
    return TokenRows(tensor.data_ptr(), images, heads, tokens)


def aligned(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor, aligned for the widest load."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % VECTOR_BYTES else tensor


class Locations:
    """The locations of points, and their gradient."""

    def __init__(self, locations: Tensor, value: Tensor) -> None:
        self.dtype = locations.dtype
        self.locations = aligned(locations.to(compute_dtype(value.dtype)))
        self.gradients: dict[str, Tensor] = {}

    def add_gradients(self) -> None:
        self.gradients["gradient"] = torch.empty_like(self.locations)

    def fields(self) -> dict[str, int]:
        return pointers(locations=self.locations, **self.gradients)

    def gradient(self) -> Tensor:
        return self.gradients["gradient"].to(self.dtype)


class Offsets:
    """The offsets of points from reference points, and the gradients of both."""

    def __init__(self, reference_points: Tensor, sampling_offsets: Tensor, sizes: list) -> None:
        self.given, self.sizes = reference_points, sizes
        exact = compute_dtype(sampling_offsets.dtype)
        self.references = aligned(reference_points.to(exact))
        self.offsets = aligned(sampling_offsets)
        # The unit of an offset from a box, as a share of its width and height.
        self.step = 0.5 / sampling_offsets.shape[4]
        self.gradients: dict[str, Tensor] = {}

    def add_gradients(self) -> None:
        # Kernels give the gradient of positions in cells, from which both others follow.
        positions = torch.empty_like(self.offsets, dtype=self.references.dtype)
        self.gradients["grad_positions"] = positions

    def fields(self) -> dict[str, int | float]:
        tensors = dict(references=self.references, offsets=self.offsets)
        coordinates = self.references.shape[3]
        return pointers(**tensors, **self.gradients) | dict(coordinates=coordinates, step=self.step)

    def extents(self) -> Tensor:
        """Return the widths and heights of the levels, ``[L, 2]``.

        A copy from the host would wait for the device, and no CUDA graph could hold it.
        """
        extents = self.references.new_empty(len(self.sizes), 2)
        for level, (height, width) in enumerate(self.sizes):
            extents[level, 0].fill_(width)
            extents[level, 1].fill_(height)
        return extents

    def gradient(self) -> Tensor:
        positions = self.gradients["grad_positions"]
        # Around a point the unit of an offset is a cell.
        if self.references.shape[3] == 4:
            units = self.references[..., 2:] * (self.extents() * self.step)
            positions = positions * units[:, :, None, :, None]
        return positions.to(self.offsets.dtype)

    def reference_gradient(self) -> Tensor:
        positions, extents = self.gradients["grad_positions"], self.extents()
        gradient = positions.sum((2, 4)) * extents
        if self.references.shape[3] == 4:
            by_extent = (positions * self.offsets).sum((2, 4)) * extents * self.step
            gradient = torch.cat([gradient, by_extent], dim=3)
        return gradient.to(self.given.dtype)
