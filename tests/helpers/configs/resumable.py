"""The tiny detector on thumbnails, with all that is random in a training: cheap to train often."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from lite_detr.data.mixing import Mixing, MixUp, Mosaic
from lite_detr.modeling import TorchvisionBackbone

from .tiny import data, dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

# A twelfth of the ResNet-18's weights, as there are many checkpoints to write.
model.backbone = L(TorchvisionBackbone)(model_name="mobilenet_v3_small", weights=None)
model.encoder.layer.dropout = 0.1
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.RandomBrightness)(intensity_min=0.8, intensity_max=1.2),
    L(T.ResizeShortestEdge)(short_edge_length=(40, 72), max_size=96, sample_style="range"),
]
dataloader.train.mixing = L(Mixing)(
    combinations=[L(Mosaic)(prob=0.5), L(MixUp)(prob=0.5)], num_iters="${train.max_iter}"
)
dataloader.test.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=48, max_size=72)]

# Saved behind iterations 1, 2 (before its evaluation), 3, 5 and 7, the last.
train.max_iter = 8
train.checkpointer.period = 2
train.eval_period = 3
train.log_period = 2
train.pictures.num_images = 1
