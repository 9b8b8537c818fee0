from ..common.models.conditional_detr import model
from ..common.schedule import COCO_EPOCH, step_schedule
from .detr_r50_500ep import data, dataloader, optimizer, train

dataloader.train.total_batch_size = 16
lr_multiplier = step_schedule(epochs=50, drop=40)
train.max_iter = 50 * COCO_EPOCH
