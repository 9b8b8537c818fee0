from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet

# torchvision's ResNet-50: stride in the 3x3 convolutions, RGB input.
backbone = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
    stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN"),
    out_features=["res3", "res4", "res5"],
    freeze_at=2,
)
init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
