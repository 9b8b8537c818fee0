from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import MultiStepParamScheduler

from ..common.mmdetection import mmdetection
from .dino_swin_l_5scale_36ep import data, dataloader, model, optimizer, train

mmdetection(model)
model.decoder.heads.shared = False
model.decoder.heads.prediction_border = 1e-5
lr_multiplier = L(MultiStepParamScheduler)(
    values=[1.0, 0.1, 0.01], milestones=[27, 33], num_updates=36
)
