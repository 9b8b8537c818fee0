from detectron2.config import LazyCall as L

from lite_detr.modeling import InterleavedEncoder, KeyAwareDeformableAttention

from .dino_efficientnet_lite0 import data, dataloader, lr_multiplier, model, optimizer, train

model.encoder = L(InterleavedEncoder)(
    layer=model.encoder.layer, num_high_levels=3, num_blocks=1, updates_per_block=2
)
model.encoder.layer.attention._target_ = KeyAwareDeformableAttention
