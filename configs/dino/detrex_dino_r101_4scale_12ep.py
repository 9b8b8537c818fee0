from ..common.backbones.resnet101 import init_checkpoint
from .detrex_dino_r50_4scale_12ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.stages.depth = 101
train.init_checkpoint = init_checkpoint
