from ..common.models.sparse_detr import model
from ..deformable_detr.deformable_detr_r50_two_stage_50ep import (
    data,
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)
