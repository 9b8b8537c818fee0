from ..common.backbones.resnet50 import init_checkpoint
from ..common.data.custom import data
from ..common.detrex import EPOCH, dataloader, detrex, optimizer, train
from ..common.models.h_detr import model
from ..common.schedule import step_schedule

detrex(model, weight_class=2.0)
lr_multiplier = step_schedule(epochs=12, drop=11)
train.max_iter = 12 * EPOCH
train.init_checkpoint = init_checkpoint
