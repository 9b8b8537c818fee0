from detectron2.config import LazyCall as L

from lite_detr.modeling import LearnedQueries

from .detrex_deformable_detr_r50_two_stage_50ep import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.queries = L(LearnedQueries)(embed_dim="${..embed_dim}", num_queries=300)
model.decoder.heads.size_bias = -2.0
