"""The competitor: Deformable DETR of the transformers library, if that is installed."""

import importlib.util

import torch
from records import Case
from subjects import Subject
from torch import Tensor, nn
from torchvision.ops import box_convert

from lite_detr.optimizer import ClippedAdamW

NAME = "transformers Deformable DETR, two-stage, R50"
# What its records say of its operators.
OPERATORS = "its own"
PIXEL_MEAN, PIXEL_STD = (123.675, 116.280, 103.530), (58.395, 57.120, 57.375)


def is_installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def transformers_subject(case: Case, **changes) -> Subject:
    """Build two-stage Deformable DETR on a ResNet-50, with random weights, like our config.

    It samples by ``grid_sample``, as its GPU kernels would have to be downloaded.

    Args:
        case: only its device is used.
        **changes: options of ``DeformableDetrConfig``.
    """
    import transformers

    backbone = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    options = dict(
        backbone_config=backbone,
        num_labels=80,
        num_queries=300,
        two_stage=True,
        with_box_refine=True,
        auxiliary_loss=True,
        disable_custom_kernels=True,
    )
    config = transformers.DeformableDetrConfig(**options | changes)
    detector = transformers.DeformableDetrForObjectDetection(config).to(case.device)
    model = detector.model
    # The library means to freeze the stem and the first stage, as we do, but looks for names that
    # its ResNet does not have, and freezes all of it.
    for name, parameter in model.backbone.named_parameters():
        parameter.requires_grad_("embedder" not in name and "stages.0." not in name)
    losses = _Losses(detector.loss_function)
    # The property of that name would hide a module.
    detector.loss_function = losses.__call__
    proposal_heads = [model.decoder.class_embed[-1], model.decoder.bbox_embed[-1]]
    return Subject(
        model=detector,
        parts={
            "backbone": [model.backbone],
            "neck": list(model.input_proj),
            "encoder": [model.encoder],
            "queries": [*proposal_heads, model.pos_trans, model.pos_trans_norm],
            "decoder": [model.decoder, *detector.class_embed, *detector.bbox_embed],
            "losses": [losses],
        },
        num_classes=config.num_labels,
        predict=lambda batch: detector(_pixel_values(batch, case.device)),
        loss=lambda batch: (
            detector(_pixel_values(batch, case.device), labels=_labels(batch, case.device)).loss
        ),
        optimizer=ClippedAdamW(detector.parameters(), lr=2e-4, weight_decay=1e-4),
    )


class _Losses(nn.Module):
    """The library's loss function, matching included, as a module that a stopwatch can watch."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **options):
        return self.function(*args, **options)


def _pixel_values(batch: list[dict], device: str) -> Tensor:
    """Stack images of one size, normalised: ``[B, 3, H, W]``; the model pads nothing."""
    images = torch.stack([inputs["image"] for inputs in batch]).to(device).float()
    mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (images - mean) / std


def _labels(batch: list[dict], device: str) -> list[dict[str, Tensor]]:
    """Return ground truth in the library's format: boxes as normalised (cx, cy, w, h)."""
    labels = []
    for inputs in batch:
        height, width = inputs["instances"].image_size
        boxes = box_convert(inputs["instances"].gt_boxes.tensor, "xyxy", "cxcywh")
        boxes = boxes / boxes.new_tensor([width, height, width, height])
        classes = inputs["instances"].gt_classes
        labels.append({"class_labels": classes.to(device), "boxes": boxes.to(device)})
    return labels
