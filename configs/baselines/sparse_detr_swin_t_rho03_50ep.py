from ..common.backbones.swin_tiny import backbone, init_checkpoint
from .sparse_detr_r50_rho03_50ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone = backbone
train.init_checkpoint = init_checkpoint
