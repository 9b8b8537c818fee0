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

# Your own dataset on CPUs: its paths are to be given, data.train_json=... and so on. See
# docs/own_data.md.
dataloader.train.dataset.names = None
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.ResizeShortestEdge)(short_edge_length=(208, 288), max_size=384, sample_style="range"),
]
dataloader.test.dataset.names = None
dataloader.test.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=256, max_size=384)
]
dataloader.test_aug.mapper.min_sizes = (224, 256, 288)
dataloader.test_aug.mapper.max_size = 432
dataloader.test_aug.mapper.flip = True

# A careful one: some datasets do not bear that of the digits.
optimizer.lr = 8e-4
train.max_iter = 1500
train.eval_period = 250
train.checkpointer.period = 250
train.checkpointer.max_to_keep = 2
# The best weights are kept in model_best.pth, and training ends if AP rises no more.
train.best.metric = "bbox/AP"
train.early_stopping.patience = 3
