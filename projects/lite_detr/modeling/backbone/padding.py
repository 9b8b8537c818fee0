"""Images of several sizes as one batch that a backbone accepts."""

from collections.abc import Sequence

from detectron2.modeling import Backbone
from detectron2.structures import ImageList
from torch import Tensor


def batch_images(images: Sequence[Tensor], backbone: Backbone) -> ImageList:
    """Pads images ``[3, H, W]`` at the bottom and right to one size that the backbone asks for.

    The list remembers the size of each image, of which the padding masks are made.

    Raises:
        ValueError: an image is larger than the square that the backbone pads to.
    """
    constraints = backbone.padding_constraints
    square = constraints.get("square_size", 0)
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    if square and max(height, width) > square:
        # Detectron2 would cut the image off and keep its boxes.
        raise ValueError(
            f"images of up to {height}x{width} pixels do not fit the square of {square} that the "
            f"backbone pads to: make them smaller by the augmentations (max_size={square}), or set "
            "square_pad of the backbone to their size, or to 0 to pad to what is needed"
        )
    return ImageList.from_tensors(
        list(images),
        padding_constraints={"square_size": square, "size_divisibility": divisibility(backbone)},
    )


def divisibility(backbone: Backbone) -> int:
    """What heights and widths must be multiples of; 0 where any do."""
    constraints = backbone.padding_constraints
    # The second is how SimpleFeaturePyramid spells it.
    for name in ("size_divisibility", "size_divisiblity"):
        if name in constraints:
            return constraints[name]
    # The property of SwinTransformer fails on a misspelt attribute. It pads within itself.
    return getattr(backbone, "size_divisibility", 0)
