from .detrex_deformable_detr_r50_refine_50ep import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.refine = False
model.decoder.heads.shared = True
