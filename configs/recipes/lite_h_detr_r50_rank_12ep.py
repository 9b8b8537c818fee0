from ..common.models.lite import make_lite
from ..common.recipes import use_rank
from ..common.schedule import warm_up
from ..h_detr.h_detr_r50_12ep import data, dataloader, lr_multiplier, model, optimizer, train

make_lite(model, "H3L1-(2+1)x3")
# From three quarters of the run on, as in the authors' code.
use_rank(model, start_iter=train.max_iter * 3 // 4)
lr_multiplier = warm_up(lr_multiplier, train)
train.ema.enabled = True
