"""Classification and box heads, and the arithmetic of boxes relative to references."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Predictions(NamedTuple):
    """What one decoder layer, or the encoder, predicts.

    Attributes:
        logits: ``[B, Q, num_classes]``, before the sigmoid.
        boxes: ``[B, Q, 4]``, normalised (cx, cy, w, h) in each image's frame without padding.
    """

    logits: Tensor
    boxes: Tensor


def by_layer(predictions: list[Predictions], suffix: str = "") -> dict[str, Predictions]:
    """The decoder layers' predictions by the suffix of their losses, as the references name them.

    The last layer's is ``suffix`` alone, the others' have ``_0``, ``_1`` and so on behind it.
    """
    *auxiliary, last = predictions
    return {suffix: last} | {f"{suffix}_{layer}": out for layer, out in enumerate(auxiliary)}


class MLP(nn.Sequential):
    """``num_layers`` linear layers with ReLUs between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int):
        dims = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        layers: list[nn.Module] = []
        for index in range(num_layers):
            layers += [nn.Linear(dims[index], dims[index + 1]), nn.ReLU()]
        super().__init__(*layers[:-1])


def class_head(embed_dim: int, num_classes: int) -> nn.Linear:
    """A linear classifier that starts at probability 0.01 (RetinaNet, section 4.1)."""
    head = nn.Linear(embed_dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))
    return head


def box_head(embed_dim: int, size_bias: float = 0.0) -> MLP:
    """A 3-layer perceptron that starts by moving a reference not at all.

    Args:
        size_bias: the logit at which width and height start; with a point as reference, which has
            no size, Deformable DETR starts at -2, a box of 12 % of the image.
    """
    head = MLP(embed_dim, embed_dim, 4, num_layers=3)
    nn.init.zeros_(head[-1].weight)
    nn.init.zeros_(head[-1].bias)
    nn.init.constant_(head[-1].bias[2:], size_bias)
    return head


class PredictionHeads(nn.Module):
    """A class head and a box head for each decoder layer.

    Args:
        embed_dim: channels ``C`` of the queries.
        num_classes: foreground classes.
        num_layers: the decoder's layers.
        shared: one pair of heads for all layers, as where the decoder does not refine its boxes.
        size_bias: see :func:`box_head`; of the first layer, whose reference may be a point.
        border: references nearer than this to the border of ``[0, 1]`` count as this near, since
            their logits would be infinite; Deformable DETR has 1e-5, DINO 1e-3.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        num_layers: int,
        shared: bool = False,
        size_bias: float = 0.0,
        border: float = 1e-5,
    ):
        super().__init__()
        pairs = 1 if shared else num_layers
        self.class_embed = nn.ModuleList(class_head(embed_dim, num_classes) for _ in range(pairs))
        self.bbox_embed = nn.ModuleList(
            box_head(embed_dim, size_bias if layer == 0 else 0.0) for layer in range(pairs)
        )
        self.num_layers = num_layers
        self.border = border

    def classify(self, layer: int, queries: Tensor) -> Tensor:
        """``[B, Q, C]`` -> logits ``[B, Q, num_classes]``"""
        return self.class_embed[layer % len(self.class_embed)](queries)

    def refine(self, layer: int, queries: Tensor, reference: Tensor) -> Tensor:
        """Moves references ``[B, Q, 2 or 4]`` to boxes ``[B, Q, 4]``, all normalised."""
        delta = self.bbox_embed[layer % len(self.bbox_embed)](queries)
        return move_reference(reference, delta, self.border)


def move_reference(reference: Tensor, delta: Tensor, border: float = 1e-5) -> Tensor:
    """Adds ``delta [B, Q, 4]`` to points or boxes ``[B, Q, 2 or 4]`` in logit space.

    Iterative bounding box refinement (Deformable DETR, appendix A.4.1, eq. 4).
    """
    delta = delta.to(reference.dtype)
    logits = inverse_sigmoid(reference, border)
    if reference.shape[-1] == 2:
        logits = nn.functional.pad(logits, (0, 2))
    return (logits + delta).sigmoid()


def inverse_sigmoid(x: Tensor, border: float = 1e-5) -> Tensor:
    """The logit of ``x`` in ``[0, 1]``, finite at both ends."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=border) / (1 - x).clamp(min=border))
