from lite_detr.modeling import MultiScaleDeformableAttention

from .lite_dino_efficientnet_lite0 import data, dataloader, lr_multiplier, model, optimizer, train

model.encoder.layer.attention._target_ = MultiScaleDeformableAttention
