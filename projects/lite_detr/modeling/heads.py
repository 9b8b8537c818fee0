"""Classification and box heads, and boxes relative to references."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layers import MLP


class Predictions(NamedTuple):
    """The predictions of one decoder layer, or of the encoder.

    Attributes:
        logits: ``[B, Q, num_classes]``, before the sigmoid.
        boxes: ``[B, Q, 4]``, normalised (cx, cy, w, h) in each image's frame without padding.
    """

    logits: Tensor
    boxes: Tensor

    def slice(self, start: int, stop: int | None = None) -> "Predictions":
        """Return the predictions of some queries, from ``start`` to before ``stop``."""
        return Predictions(self.logits[:, start:stop], self.boxes[:, start:stop])


class MixedPredictions(Predictions):
    """The predictions of a :class:`MixedDecoderLayer` in training.

    Attributes:
        one_to_many: those of the same queries before they saw each other.
    """

    one_to_many: Predictions

    @classmethod
    def join(cls, one_to_one: Predictions, one_to_many: Predictions) -> "MixedPredictions":
        joined = cls(*one_to_one)
        joined.one_to_many = one_to_many
        return joined

    def slice(self, start: int, stop: int | None = None) -> "MixedPredictions":
        """See :meth:`Predictions.slice`."""
        return self.join(super().slice(start, stop), self.one_to_many.slice(start, stop))


def by_layer(predictions: list[Predictions], suffix: str = "") -> dict[str, Predictions]:
    """Key the decoder layers' predictions by the suffix of their losses, as the references do.

    The last layer's key is ``suffix``; the others append ``_0``, ``_1`` and so on. One-to-many
    predictions of mixed layers have the suffix ``_mixed`` before that.
    """
    *auxiliary, last = predictions
    outputs = {suffix: last} | {f"{suffix}_{layer}": out for layer, out in enumerate(auxiliary)}
    mixed = [out.one_to_many for out in predictions if isinstance(out, MixedPredictions)]
    return outputs | by_layer(mixed, f"{suffix}_mixed") if mixed else outputs


def class_head(embed_dim: int, num_classes: int) -> nn.Linear:
    """Return a linear classifier that starts at probability 0.01 (RetinaNet, section 4.1)."""
    head = nn.Linear(embed_dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))
    return head


def box_head(embed_dim: int, size_bias: float = 0.0) -> MLP:
    """Return a 3-layer perceptron that leaves references where they are at first.

    Args:
        embed_dim: channels ``C`` of the queries.
        size_bias: the logit at which width and height start. If the reference is a point, which
            has no size, Deformable DETR starts at -2, a box of 12 % of the image.
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
        num_layers: the number of decoder layers.
        shared: use one pair of heads for all layers, for instance if the decoder does not refine.
        size_bias: see :func:`box_head`; for the first layer, whose reference may be a point.
        border: references are kept this far from the border of ``[0, 1]``, where their logits would
            be infinite; Deformable DETR uses 1e-5, DINO 1e-3.
        prediction_border: the same where a reference becomes the predicted box instead of the next
            layer's reference; None: as ``border``. MMDetection's DINO uses 1e-5 here.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        num_layers: int,
        shared: bool = False,
        size_bias: float = 0.0,
        border: float = 1e-5,
        prediction_border: float | None = None,
    ):
        super().__init__()
        pairs = 1 if shared else num_layers
        self.class_embed = nn.ModuleList(class_head(embed_dim, num_classes) for _ in range(pairs))
        self.bbox_embed = nn.ModuleList(
            box_head(embed_dim, size_bias if layer == 0 else 0.0) for layer in range(pairs)
        )
        self.num_layers = num_layers
        self.border = border
        self.prediction_border = border if prediction_border is None else prediction_border

    def classify(self, layer: int, queries: Tensor) -> Tensor:
        """``[B, Q, C]`` -> logits ``[B, Q, num_classes]``"""
        return self.class_embed[layer % len(self.class_embed)](queries)

    def refine(self, layer: int, queries: Tensor, reference: Tensor) -> Tensor:
        """Move references ``[B, Q, 2 or 4]`` to boxes ``[B, Q, 4]``, all normalised."""
        return move_reference(reference, self._moves(layer, queries), self.border)

    def predict_boxes(self, layer: int, queries: Tensor, reference: Tensor) -> Tensor:
        """Do as :meth:`refine` does for the boxes that are predicted."""
        return move_reference(reference, self._moves(layer, queries), self.prediction_border)

    def _moves(self, layer: int, queries: Tensor) -> Tensor:
        return self.bbox_embed[layer % len(self.bbox_embed)](queries)


def move_reference(reference: Tensor, delta: Tensor, border: float = 1e-5) -> Tensor:
    """Add ``delta [B, Q, 4]`` to points or boxes ``[B, Q, 2 or 4]`` in logit space.

    Iterative bounding box refinement (Deformable DETR, appendix A.4.1, eq. 4).
    """
    delta = delta.to(reference.dtype)
    logits = inverse_sigmoid(reference, border)
    if reference.shape[-1] == 2:
        logits = nn.functional.pad(logits, (0, 2))
    return (logits + delta).sigmoid()


def inverse_sigmoid(x: Tensor, border: float = 1e-5) -> Tensor:
    """Return the logit of ``x`` in ``[0, 1]``, finite at both ends."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=border) / (1 - x).clamp(min=border))
