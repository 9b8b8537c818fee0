from detectron2.config import LazyCall as L

from lite_detr.modeling import (
    InterleavedEncoder,
    KeyAwareDeformableAttention,
    TimmBackbone,
)
from lite_detr.modeling.backbone.efficientnet_lite import efficientnet_lite0_state_dict

from ..common.data.custom import data
from ..common.data.digits import dataloader
from ..common.models.deformable_detr import model
from ..common.optimizer import optimizer
from ..common.schedule import step_schedule
from ..common.train import train

model.num_classes = 10
model.backbone = L(TimmBackbone)(
    model_name="tf_efficientnet_lite0",
    state_dict=L(efficientnet_lite0_state_dict)(),
    frozen_stride=4,
)
model.pixel_mean = model.pixel_std = [127.5, 127.5, 127.5]
model.embed_dim = 128
model.encoder = L(InterleavedEncoder)(
    layer=model.encoder.layer, num_high_levels=3, num_blocks=1, updates_per_block=2
)
model.encoder.layer.attention._target_ = KeyAwareDeformableAttention
model.encoder.layer.attention.num_heads = 4
model.encoder.layer.ffn.hidden_dim = 512
model.encoder.layer.dropout = 0.0
model.queries.num_queries = 50
model.decoder.heads.num_layers = 3

optimizer.lr = 5e-4
optimizer.clip_norm = 1.0
lr_multiplier = step_schedule(epochs=10, drop=8)
train.max_iter = 600
train.eval_period = 200
train.log_period = 20
train.checkpointer.period = 10000
