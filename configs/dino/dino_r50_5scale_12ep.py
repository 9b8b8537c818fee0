from ..common.schedule import COCO_EPOCH, step_schedule
from .dino_r50_5scale_36ep import data, dataloader, model, optimizer, train

lr_multiplier = step_schedule(epochs=12, drop=11)
train.max_iter = 12 * COCO_EPOCH
