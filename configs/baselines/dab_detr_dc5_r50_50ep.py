from lite_detr.baselines import dilated_stages

from ..common.models.dab_detr import model
from .conditional_detr_r50_50ep import data, dataloader, lr_multiplier, optimizer, train

# ResNet.make_default_stages, which this replaces, has stride 32.
model.backbone.stages._target_ = dilated_stages
