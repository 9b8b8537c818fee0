from ..common.recipes import use_align
from ..common.schedule import warm_up
from ..dino.lite_dino_r50_h3l1_2p1x3_12ep import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

use_align(model)
lr_multiplier = warm_up(lr_multiplier, train)
train.ema.enabled = True
