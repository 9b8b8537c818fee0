from ..common.models.lite import make_lite
from .lite_dino_swin_t_h3l1_2p1x3_36ep import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

make_lite(model, "H2L2-(2+1)x3")
