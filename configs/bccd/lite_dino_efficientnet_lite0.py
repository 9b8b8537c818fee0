import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from ..digits.lite_dino_efficientnet_lite0 import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

# BCCD: some 300 microscope images of 640x480 pixels with three kinds of blood cells. Its paths are
# to be given, data.train_json=... and so on: see docs/backbones.md.
dataloader.train.dataset.names = None
dataloader.train.mapper.augmentations = [
    # A cell has no side that is up.
    L(T.RandomFlip)(horizontal=True, vertical=False),
    L(T.RandomFlip)(horizontal=False, vertical=True),
    L(T.ResizeShortestEdge)(short_edge_length=(208, 288), max_size=384, sample_style="range"),
]
dataloader.test.dataset.names = None
dataloader.test.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=256, max_size=384)
]

model.num_classes = 3
train.max_iter = 900
train.eval_period = 450
train.checkpointer.period = 450
