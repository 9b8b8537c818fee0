from lite_detr.baselines import dilated_stages

from .anchor_detr_r50_50ep import data, dataloader, lr_multiplier, model, optimizer, train

# ResNet.make_default_stages, which this replaces, has stride 32.
model.backbone.stages._target_ = dilated_stages
