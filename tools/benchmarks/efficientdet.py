"""A second competitor, which is not a DETR: EfficientDet of the effdet library, if installed."""

import importlib.util

import torch
import torch.nn.functional as F
from competitor import PIXEL_MEAN, PIXEL_STD
from records import Case
from subjects import Subject
from torch import Tensor

from lite_detr.errors import LiteDetrError

NAME = "effdet EfficientDet-D6"


def is_installed() -> bool:
    return importlib.util.find_spec("effdet") is not None


def efficientdet_subject(case: Case, model: str = "tf_efficientdet_d6") -> Subject:
    """Build an EfficientDet with random weights; for inference alone.

    Images are padded to the square that the model is built for, 1280x1280 for D6. Its pyramid
    (BiFPN) counts as the encoder, its heads as the decoder.

    Args:
        case: its device and size are used.
        model: effdet's name of the model.

    Raises:
        LiteDetrError: images of the case are larger than the square.
    """
    import effdet

    detector = effdet.create_model(
        model, bench_task="predict", pretrained=False, pretrained_backbone=False
    ).to(case.device)
    square = tuple(detector.config.image_size)
    if any(side > most for side, most in zip(case.size, square)):
        raise LiteDetrError(f"{NAME} takes images of up to {square[0]}x{square[1]} pixels")
    network = detector.model
    return Subject(
        model=detector,
        parts={
            "backbone": [network.backbone],
            "encoder": [network.fpn],
            "decoder": [network.class_net, network.box_net],
        },
        num_classes=detector.config.num_classes,
        predict=lambda batch: detector(
            stack([inputs["image"].to(case.device) for inputs in batch], square)
        ),
        loss=_refuse,
        optimizer=None,
    )


def stack(images: list[Tensor], square: tuple[int, int]) -> Tensor:
    """Normalise images ``[3, H, W]``, and pad them with zeros at the bottom and right."""
    padded = []
    for image in images:
        image = image.float()
        mean, std = (image.new_tensor(v).view(-1, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
        height, width = image.shape[1:]
        padding = (0, square[1] - width, 0, square[0] - height)
        padded.append(F.pad((image - mean) / std, padding))
    return torch.stack(padded)


def _refuse(batch: list[dict]) -> Tensor:
    raise LiteDetrError(f"{NAME} is for --tasks inference only")
