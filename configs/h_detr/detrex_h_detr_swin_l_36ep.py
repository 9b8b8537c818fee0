from ..common.swin import swin, swin_checkpoint
from .detrex_h_detr_r50_36ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone = swin("l", drop_path_rate=0.5)
train.init_checkpoint = swin_checkpoint("swin_large_patch4_window7_224_22k")
