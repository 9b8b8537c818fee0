from ..common.swin import swin, swin_checkpoint
from .detrex_dino_r50_4scale_12ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone = swin("b", images=384)
train.init_checkpoint = swin_checkpoint("swin_base_patch4_window12_384_22kto1k")
