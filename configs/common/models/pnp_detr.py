from detectron2.config import LazyCall as L

from lite_detr.baselines import PnPDETR, TokenSampler

from .detr import model

model._target_ = PnPDETR
model.sampler = L(TokenSampler)(
    embed_dim="${..embed_dim}", ratio=1 / 3, max_ratio=0.8, num_coarse=60
)
