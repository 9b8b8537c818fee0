from detectron2.config import LazyCall as L
from torch import nn

from lite_detr.modeling import DINO, ContrastiveDenoising, DinoQueries, ReferencePosition

from .deformable_detr import model

model._target_ = DINO
model.position_encoding.temperature = 20
model.position_encoding.offset = 0.0
model.encoder.layer.ffn.hidden_dim = 2048
model.encoder.layer.dropout = 0.0
model.queries = L(DinoQueries)(
    embed_dim="${..embed_dim}", num_classes="${..num_classes}", num_queries=900
)
model.decoder.look_forward_twice = True
model.decoder.query_pos = L(ReferencePosition)(embed_dim="${...embed_dim}")
model.decoder.norm = L(nn.LayerNorm)(normalized_shape="${...embed_dim}")
model.decoder.heads.shared = True
model.decoder.heads.border = 1e-3
model.denoising = L(ContrastiveDenoising)(
    embed_dim="${..embed_dim}",
    num_classes="${..num_classes}",
    num_queries=100,
    label_noise=0.5,
    box_noise=1.0,
)
model.criterion.weight_class = 1.0
# As in the released code, which Deformable DETR's and H-DETR's is not.
model.criterion.giou_eps = 1e-6
model.criterion.matcher.giou_eps = "${..giou_eps}"
model.detections_per_image = 300
