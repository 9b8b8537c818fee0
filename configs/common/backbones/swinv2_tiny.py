from detectron2.config import LazyCall as L

from lite_detr.modeling import TimmBackbone

# Patches of 4 pixels that are merged three times: every scale is whole in multiples of 32.
# model.backbone.pretrained=True lets timm download its weights.
backbone = L(TimmBackbone)(
    model_name="swinv2_tiny_window8_256",
    pretrained=False,
    size_divisibility=32,
    options=dict(strict_img_size=False, drop_path_rate=0.2),
)
