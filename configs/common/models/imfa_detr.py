from detectron2.config import LazyCall as L

from lite_detr.baselines import (
    IMFADETR,
    FeatureSampler,
    SplitEncoderLayer,
    SplitSelfAttention,
)

from .dab_detr import model

model._target_ = IMFADETR
model.backbone.out_features = ["res2", "res3", "res4", "res5"]
model.num_levels = 4
model.position_encoding.offset = -0.5
model.encoder.layer._target_ = SplitEncoderLayer
model.encoder.layer.attention._target_ = SplitSelfAttention
model.queries.uniform_centers = True
model.sampler = L(FeatureSampler)(
    embed_dim="${..embed_dim}", num_levels="${..num_levels}", num_points=8, share=0.2
)
