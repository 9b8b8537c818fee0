from detectron2.config import LazyCall as L

from lite_detr.baselines import (
    DABDETR,
    AnchorBoxes,
    AnchorDecoder,
    PReLUFeedForward,
    ScaledEncoder,
)

from .conditional_detr import model

model._target_ = DABDETR
model.position_encoding.temperature = 20
model.encoder._target_ = ScaledEncoder
model.encoder.layer.ffn._target_ = PReLUFeedForward
model.encoder.layer.dropout = 0.0
model.queries = L(AnchorBoxes)(embed_dim="${..embed_dim}", num_queries=300)
model.decoder._target_ = AnchorDecoder
# As in the released code.
model.decoder.heads.border = 1e-3
model.criterion.weight_class = 1.0
model.criterion.giou_eps = 1e-6
model.criterion.matcher.giou_eps = "${..giou_eps}"
model.detections_per_image = 300
