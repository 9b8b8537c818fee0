from ..common.swin import swin, swin_checkpoint
from .detrex_dino_r50_4scale_12ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone = swin("t", drop_path_rate=0.1)
train.init_checkpoint = swin_checkpoint("swin_tiny_patch4_window7_224")
