"""The weights that depend on the number of classes: heads and DINO's label embedding."""

import re
from collections.abc import Mapping

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor, nn

# The only weights whose shapes depend on the number of classes.
CLASS_WEIGHT = re.compile(r"(decoder\.heads|queries)\.class_embed\.|denoising\.label_embed\.")
# The references have a channel for each of COCO's category ids, 0 to 90, of which 80 are in use;
# Detectron2 numbers these 80 in their order.
COCO_CATEGORY_IDS = tuple(category["id"] for category in COCO_CATEGORIES if category["isthing"])
NUM_COCO_IDS = max(COCO_CATEGORY_IDS) + 1


def count_classes(weights: Mapping[str, Tensor]) -> int | None:
    """The classes of the decoder's first head; None without one."""
    head = weights.get("decoder.heads.class_embed.0.bias")
    return None if head is None else len(head)


def adapt_classes(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Brings the class weights of a detector to a model's number of classes.

    Args:
        weights: all weights of a file, by our names.
        model: where proposals are class-agnostic, their head's first channel, "any object", is kept
            with those behind it; otherwise its channels are classes as the decoder's are.

    Returns:
        All weights, with class weights for as many classes. They are left out where one cannot tell
        that the classes are the same: they are for equal counts, and from COCO's 91 category ids
        to its 80 classes.
    """
    given = count_classes(weights)
    if given == model.num_classes:
        by_class = torch.arange(given)
    elif (given, model.num_classes) == (NUM_COCO_IDS, len(COCO_CATEGORY_IDS)):
        by_class = torch.tensor(COCO_CATEGORY_IDS)
    else:
        return {name: value for name, value in weights.items() if not CLASS_WEIGHT.match(name)}
    class_agnostic = getattr(model.queries, "class_agnostic", False)

    def adapt(name: str, value: Tensor) -> Tensor:
        if not CLASS_WEIGHT.match(name):
            return value
        if name.startswith("denoising."):
            # The last row is there without being used, in the references as here.
            return torch.cat([value[by_class], value[-1:]])
        if name.startswith("queries.") and class_agnostic:
            return value[: model.num_classes]
        return value[by_class]

    return {name: adapt(name, value) for name, value in weights.items()}
