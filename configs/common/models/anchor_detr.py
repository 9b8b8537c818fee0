from detectron2.config import LazyCall as L

from lite_detr.baselines import (
    AnchorDETR,
    AnchorPoints,
    AxisDecoderLayer,
    AxisEncoderLayer,
    AxisEncoding,
    RowColumnAttention,
)
from lite_detr.modeling import DeformableDecoder

from .conditional_detr import model

model._target_ = AnchorDETR
model.position_encoding = L(AxisEncoding)(embed_dim="${..embed_dim}")
model.encoder.layer._target_ = AxisEncoderLayer
model.encoder.layer.attention._target_ = RowColumnAttention
model.encoder.layer.ffn.hidden_dim = 1024
model.encoder.layer.dropout = 0.0
model.queries = L(AnchorPoints)(embed_dim="${..embed_dim}", num_queries=300, num_patterns=3)
model.decoder._target_ = DeformableDecoder
model.decoder.refine = False
model.decoder.norm = None
model.decoder.layer._target_ = AxisDecoderLayer
model.decoder.layer.attention._target_ = RowColumnAttention
model.decoder.heads.size_bias = -2.0
