from ..common.models.lite import make_lite
from ..common.recipes import use_mixed
from ..common.schedule import warm_up
from ..h_detr.h_detr_r50_12ep import data, dataloader, lr_multiplier, model, optimizer, train

make_lite(model, "H3L1-(2+1)x3")
use_mixed(model)
lr_multiplier = warm_up(lr_multiplier, train)
train.ema.enabled = True
