from ..common.backbones.swin_tiny import backbone, init_checkpoint
from .h_detr_r50_36ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone = backbone
train.init_checkpoint = init_checkpoint
optimizer.weight_decay = 0.05
