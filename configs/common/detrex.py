from .data.coco import dataloader
from .optimizer import optimizer
from .train import train

# What detrex's configs share where it differs from ours.
EPOCH = 7500
dataloader.train.dataset.filter_empty = True
optimizer.lr = 1e-4
optimizer.params.lr_factor_func.factors = {"backbone.": 0.1}
optimizer.params.weight_decay_norm = 0.0


def detrex(model, weight_class=1.0):
    """Compute as detrex's code does; docs/from_detrex.md lists the differences."""
    model.position_encoding.temperature = 10000
    model.position_encoding.offset = -0.5
    model.decoder.heads.border = 1e-3
    model.criterion.weight_class = weight_class
    model.criterion.giou_eps = 1e-6
    model.criterion.matcher.giou_eps = "${..giou_eps}"
    model.detections_per_image = 300
    if "freeze_at" in model.backbone:
        # The stem alone.
        model.backbone.freeze_at = 1
