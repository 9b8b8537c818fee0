from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import FPN

from .resnet50 import backbone, init_checkpoint

backbone = L(FPN)(
    bottom_up=backbone,
    in_features="${.bottom_up.out_features}",
    out_channels=256,
)
