"""timm's padding of "same" convolutions, in a form that can be traced for all sizes."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from unittest import mock

import torch.nn.functional as F
from torch import Tensor

CONVOLUTIONS = "timm.layers.conv2d_same"


@contextlib.contextmanager
def traceable_same_padding() -> Iterator[None]:
    """Lets the convolutions of timm that pad to the same size call :func:`pad_same`.

    Their own rounds up and takes a maximum, and does so with what it gave before, stride after
    stride: formulas of sizes that a tracer does not come to the end of.
    """
    with contextlib.ExitStack() as stack:
        if CONVOLUTIONS in sys.modules:
            stack.enter_context(mock.patch.object(sys.modules[CONVOLUTIONS], "pad_same", pad_same))
        yield


def pad_same(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    value: float = 0.0,
) -> Tensor:
    """Pads ``[B, C, H, W]`` so that a convolution gives ``H`` and ``W`` by stride, rounded up.

    At the top and left as timm does it. At the bottom and right there may be more, which no output
    sees, so that in all there is as much for every size.
    """
    padding = []
    for axis in (1, 0):  # Padding begins with the last axis.
        reach = (kernel_size[axis] - 1) * dilation[axis]
        needed = reach - (x.shape[2 + axis] - 1) % stride[axis]
        before = needed // 2 if reach + 1 >= stride[axis] else max(needed, 0) // 2
        padding += [before, reach - before]
    return F.pad(x, padding, value=value)
