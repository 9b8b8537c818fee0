from ..common.digits import data, dataloader, lr_multiplier, optimizer, small, train
from ..common.models.deformable_detr import model

small(model)
