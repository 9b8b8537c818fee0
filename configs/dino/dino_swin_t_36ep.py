from ..common.backbones.swin_tiny import backbone, init_checkpoint
from .dino_r50_4scale_36ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone = backbone
train.init_checkpoint = init_checkpoint
