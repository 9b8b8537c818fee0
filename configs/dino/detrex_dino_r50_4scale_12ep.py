from ..common.backbones.resnet50 import init_checkpoint
from ..common.data.custom import data
from ..common.detrex import EPOCH, dataloader, detrex, optimizer, train
from ..common.models.dino import model
from ..common.schedule import step_schedule

detrex(model)
# Each layer of the decoder has its own heads.
model.decoder.heads.shared = False
lr_multiplier = step_schedule(epochs=12, drop=11)
train.max_iter = 12 * EPOCH
train.init_checkpoint = init_checkpoint
