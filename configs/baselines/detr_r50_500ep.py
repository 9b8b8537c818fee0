from ..common.backbones.resnet50 import init_checkpoint
from ..common.data.coco import dataloader
from ..common.data.custom import data
from ..common.models.detr import model
from ..common.optimizer import optimizer
from ..common.schedule import COCO_EPOCH, step_schedule
from ..common.train import train

optimizer.lr = 1e-4
optimizer.params.lr_factor_func.factors = {"backbone.": 0.1}
# As in the paper, on 16 GPUs.
dataloader.train.total_batch_size = 64
lr_multiplier = step_schedule(epochs=500, drop=400)
train.max_iter = 500 * COCO_EPOCH * 16 // 64
train.init_checkpoint = init_checkpoint
