from ..common.models.lite import make_lite
from .lite_deformable_detr_r50_h3l1_2p1x3_50ep import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

make_lite(model, "H3L1-(3+1)x2")
