from ..common.mmdetection import mmdetection
from .dino_r50_4scale_12ep import data, dataloader, lr_multiplier, model, optimizer, train

mmdetection(model)
# Each layer of the decoder has its own heads.
model.decoder.heads.shared = False
model.decoder.heads.prediction_border = 1e-5
