from detectron2.config import LazyCall as L

from lite_detr.baselines import (
    ConditionalAttention,
    ConditionalDecoder,
    ConditionalDecoderLayer,
    ConditionalDETR,
    PointQueries,
)
from lite_detr.modeling import HungarianMatcher, PredictionHeads, SetCriterion

from .detr import model

model._target_ = ConditionalDETR
model.queries = L(PointQueries)(embed_dim="${..embed_dim}", num_queries=300)
model.decoder._target_ = ConditionalDecoder
model.decoder.layer._target_ = ConditionalDecoderLayer
model.decoder.layer.attention._target_ = ConditionalAttention
model.decoder.heads = L(PredictionHeads)(
    embed_dim="${...embed_dim}", num_classes="${...num_classes}", num_layers=6, shared=True
)
del model.decoder.refine
model.criterion = L(SetCriterion)(matcher=L(HungarianMatcher)())
