import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from .coco import dataloader

# The embedded dataset that tools/make_digits.py writes: images of 224 to 320 pixels a side.
dataloader.train.dataset.names = "digits_train"
dataloader.train.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=(192, 256), max_size=320, sample_style="range"),
]
dataloader.train.num_workers = 0
dataloader.test.dataset.names = "digits_val"
dataloader.test.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=256, max_size=320)
]
dataloader.test.num_workers = 0
# A mirrored digit is another one, or none.
dataloader.test_aug.mapper.min_sizes = (224, 256, 288)
dataloader.test_aug.mapper.max_size = 400
dataloader.test_aug.mapper.flip = False
