from lite_detr.baselines import dilated_stages

from .conditional_detr_r50_50ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.stages._target_ = dilated_stages
# One image for each of 8 GPUs.
dataloader.train.total_batch_size = 8
train.max_iter *= 2
