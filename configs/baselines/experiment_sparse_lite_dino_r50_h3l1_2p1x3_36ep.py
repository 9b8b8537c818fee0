from lite_detr.baselines import SparseDINO, SparseInterleavedEncoder

from ..dino.lite_dino_r50_h3l1_2p1x3_36ep import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

# An experiment: no paper has it, and nobody has trained it on COCO. Low-level updates take the
# best-scored quarter of the finest map.
model._target_ = SparseDINO
model.encoder._target_ = SparseInterleavedEncoder
model.encoder.keep_ratio = 0.25
