from ..common.swin import swin, swin_checkpoint
from .detrex_dino_r50_4scale_12ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone = swin("s")
train.init_checkpoint = swin_checkpoint("swin_small_patch4_window7_224")
