from detectron2.config import LazyCall as L

from lite_detr.baselines import DNDETR, LabelledAnchors, QueryDenoising

from .dab_detr import model

model._target_ = DNDETR
model.queries = L(LabelledAnchors)(
    embed_dim="${..embed_dim}", num_labels="${..num_classes}", num_queries=300
)
model.denoising = L(QueryDenoising)(
    num_classes="${..num_classes}", num_groups=5, label_noise=0.2, box_noise=0.4
)
