from ..common.swin import swin, swin_checkpoint
from .dino_r50_4scale_36ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone = swin("l", images=384)
train.init_checkpoint = swin_checkpoint("swin_large_patch4_window12_384_22k")
