from ..common.backbones.resnet50 import init_checkpoint
from ..common.data.coco import dataloader
from ..common.data.custom import data
from ..common.models.dino import model
from ..common.optimizer import optimizer
from ..common.schedule import COCO_EPOCH, step_schedule
from ..common.train import train

optimizer.lr = 1e-4
optimizer.params.lr_factor_func.factors = {"backbone.": 0.1}
lr_multiplier = step_schedule(epochs=36, drop=30)
train.max_iter = 36 * COCO_EPOCH
train.init_checkpoint = init_checkpoint
