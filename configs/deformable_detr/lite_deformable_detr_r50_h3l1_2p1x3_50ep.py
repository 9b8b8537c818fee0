from ..common.models.lite import make_lite
from .deformable_detr_r50_two_stage_50ep import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

make_lite(model, "H3L1-(2+1)x3")
