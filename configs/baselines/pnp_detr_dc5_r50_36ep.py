from lite_detr.baselines import dilated_stages

from ..common.models.pnp_detr import model
from .imfa_detr_r50_36ep import data, dataloader, lr_multiplier, optimizer, train

# ResNet.make_default_stages, which this replaces, has stride 32.
model.backbone.stages._target_ = dilated_stages
