from detectron2.config import LazyCall as L

from lite_detr.modeling import HDETR, HybridQueries

from .deformable_detr import model

model._target_ = HDETR
model.encoder.layer.ffn.hidden_dim = 2048
model.encoder.layer.dropout = 0.0
model.queries = L(HybridQueries)(
    embed_dim="${..embed_dim}",
    num_classes="${..num_classes}",
    num_queries=300,
    num_one_to_many=1500,
)
model.decoder.look_forward_twice = True
model.one_to_many = 6
model.weight_one_to_many = 1.0
