from ..common.backbones.resnet50 import init_checkpoint
from ..common.data.custom import data
from ..common.detrex import EPOCH, dataloader, detrex, optimizer, train
from ..common.models.deformable_detr import model
from ..common.schedule import step_schedule

detrex(model)
lr_multiplier = step_schedule(epochs=50, drop=40)
train.max_iter = 50 * EPOCH
train.init_checkpoint = init_checkpoint
