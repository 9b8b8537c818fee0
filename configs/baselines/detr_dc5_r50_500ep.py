from lite_detr.baselines import dilated_stages

from .detr_r50_500ep import data, dataloader, lr_multiplier, model, optimizer, train

# Stride 16; ResNet.make_default_stages, which this replaces, has stride 32.
model.backbone.stages._target_ = dilated_stages
