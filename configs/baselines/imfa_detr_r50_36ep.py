from ..common.models.imfa_detr import model
from ..common.schedule import COCO_EPOCH, step_schedule
from .conditional_detr_r50_50ep import data, dataloader, optimizer, train

lr_multiplier = step_schedule(epochs=36, drop=30)
train.max_iter = 36 * COCO_EPOCH
