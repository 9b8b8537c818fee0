from ..common.backbones.resnet50 import init_checkpoint
from ..common.data.coco import dataloader
from ..common.data.custom import data
from ..common.models.h_detr import model
from ..common.optimizer import optimizer
from ..common.schedule import COCO_EPOCH, step_schedule
from ..common.train import train

lr_multiplier = step_schedule(epochs=36, drop=30)
train.max_iter = 36 * COCO_EPOCH
train.init_checkpoint = init_checkpoint
