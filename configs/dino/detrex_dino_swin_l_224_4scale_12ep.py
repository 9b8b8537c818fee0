from ..common.swin import swin, swin_checkpoint
from .detrex_dino_r50_4scale_12ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone = swin("l")
train.init_checkpoint = swin_checkpoint("swin_large_patch4_window7_224_22kto1k")
