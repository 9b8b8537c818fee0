from .lite_deformable_detr_r50_h3l1_2p1x3_50ep import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.encoder.num_blocks = 2
model.encoder.updates_per_block = 3
