from ..common.detrex import EPOCH
from ..common.schedule import step_schedule
from .detrex_dino_r50_4scale_12ep import data, dataloader, model, optimizer, train

# The authors' position encoding, and their images without objects, in this config alone.
model.position_encoding.temperature = 20
model.position_encoding.offset = 0.0
dataloader.train.dataset.filter_empty = False
lr_multiplier = step_schedule(epochs=24, drop=20)
train.max_iter = 24 * EPOCH
