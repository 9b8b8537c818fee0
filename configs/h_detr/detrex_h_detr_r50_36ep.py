from ..common.detrex import EPOCH
from ..common.schedule import step_schedule
from .detrex_h_detr_r50_12ep import data, dataloader, model, optimizer, train

lr_multiplier = step_schedule(epochs=36, drop=30)
train.max_iter = 36 * EPOCH
