import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from ..own_data.lite_dino_efficientnet_lite0 import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

# BCCD: some 300 microscope images of 640x480 pixels with three kinds of blood cells. Its paths are
# to be given, data.train_json=... and so on: see docs/backbones.md.
# A cell has no side that is up.
dataloader.train.mapper.augmentations.insert(1, L(T.RandomFlip)(horizontal=False, vertical=True))

model.num_classes = 3
train.max_iter = 900
train.eval_period = 450
train.checkpointer.period = 450
