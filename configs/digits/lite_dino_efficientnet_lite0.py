from detectron2.config import LazyCall as L

from lite_detr.modeling import InterleavedEncoder, KeyAwareDeformableAttention

from ..common.data.custom import data
from ..common.data.digits import dataloader
from ..common.models.dino import model
from ..common.models.efficientnet_lite0 import backbone, pixel_mean, pixel_std
from ..common.optimizer import optimizer
from ..common.schedule import step_schedule
from ..common.train import train

model.backbone = backbone
model.pixel_mean = pixel_mean
model.pixel_std = pixel_std
model.num_classes = 10
model.embed_dim = 128
model.encoder = L(InterleavedEncoder)(
    layer=model.encoder.layer, num_high_levels=3, num_blocks=1, updates_per_block=2
)
model.encoder.layer.attention._target_ = KeyAwareDeformableAttention
model.encoder.layer.attention.num_heads = 4
model.encoder.layer.ffn.hidden_dim = 512
model.queries.num_queries = 50
model.decoder.heads.num_layers = 3
model.denoising.num_queries = 50
model.detections_per_image = 50

optimizer.lr = 5e-4
optimizer.clip_norm = 1.0
lr_multiplier = step_schedule(epochs=10, drop=8)
dataloader.train.total_batch_size = 4
train.max_iter = 1000
train.eval_period = 250
train.checkpointer.period = 1000
