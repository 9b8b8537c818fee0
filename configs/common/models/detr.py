from detectron2.config import LazyCall as L
from torch import nn

from lite_detr.baselines import (
    DETR,
    DenseCrossAttention,
    DenseSelfAttention,
    NoObjectHeads,
    PositionQueries,
    SoftmaxCriterion,
    SoftmaxMatcher,
)

from .deformable_detr import model

# One map, and dense attention; the parts around it are Deformable DETR's.
model._target_ = DETR
model.backbone.out_features = ["res5"]
model.num_levels = 1
model.position_encoding.offset = 0.0
model.encoder.layer.attention = L(DenseSelfAttention)(
    embed_dim="${....embed_dim}", num_heads=8, dropout="${..dropout}"
)
model.encoder.layer.ffn.hidden_dim = 2048
model.queries = L(PositionQueries)(embed_dim="${..embed_dim}", num_queries=100)
model.decoder.layer.attention = L(DenseCrossAttention)(
    embed_dim="${....embed_dim}",
    num_heads="${....encoder.layer.attention.num_heads}",
    dropout="${..dropout}",
)
model.decoder.heads = L(NoObjectHeads)(
    embed_dim="${...embed_dim}", num_classes="${...num_classes}", num_layers=6
)
model.decoder.norm = L(nn.LayerNorm)(normalized_shape="${...embed_dim}")
model.decoder.refine = False
model.criterion = L(SoftmaxCriterion)(matcher=L(SoftmaxMatcher)())
