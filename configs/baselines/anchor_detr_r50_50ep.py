from ..common.models.anchor_detr import model
from .conditional_detr_r50_50ep import data, dataloader, lr_multiplier, optimizer, train

# One image for each of 8 GPUs.
dataloader.train.total_batch_size = 8
train.max_iter *= 2
