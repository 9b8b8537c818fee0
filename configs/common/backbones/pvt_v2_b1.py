from detectron2.config import LazyCall as L

from lite_detr.modeling import TimmBackbone

# model.backbone.pretrained=True lets timm download its weights.
backbone = L(TimmBackbone)(
    model_name="pvt_v2_b1", pretrained=False, options=dict(drop_path_rate=0.1)
)
