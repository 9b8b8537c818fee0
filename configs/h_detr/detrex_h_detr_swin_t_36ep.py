from ..common.swin import swin, swin_checkpoint
from .detrex_h_detr_r50_36ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone = swin("t")
train.init_checkpoint = swin_checkpoint("swin_tiny_patch4_window7_224")
