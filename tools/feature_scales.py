"""The names and strides of a detector's scales, and the colours that pictures give them."""

from lite_detr.modeling.detector import Detector

# From the finest scale on: markers of samples, and colours that also differ in brightness.
MARKERS = ("o", "s", "^", "D", "P", "X")
COLOURS = ("#3b4cc0", "#1a9e96", "#e3a011", "#c4342b", "#7b3294", "#555555")


class UnknownScale(LookupError):
    """A model has no scale of a stride; the message names those that it has."""


def scale_strides(model: Detector) -> list[int]:
    """The pixels that a cell of each scale is wide, finest first."""
    shapes = model.backbone.output_shape()
    strides = [shapes[name].stride for name in model.neck.in_features]
    for _ in model.neck.extra_convs:
        strides.append(2 * strides[-1])
    return strides


def scale_name(stride: int) -> str:
    """``S3`` for stride 8, as papers write it: each scale halves the one before."""
    return f"S{stride.bit_length() - 1}"


def find_scale(strides: list[int], stride: int) -> int:
    """The number of the scale of a stride.

    Raises:
        UnknownScale: there is none.
    """
    if stride not in strides:
        raise UnknownScale(
            f"the model has no scale of stride {stride}; it has {', '.join(map(str, strides))}: "
            "give two of them with --strides"
        )
    return strides.index(stride)
