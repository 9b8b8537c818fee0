from detectron2.config import LazyCall as L

from lite_detr.modeling import TimmBackbone

# model.backbone.pretrained=True lets timm download its weights.
backbone = L(TimmBackbone)(
    model_name="convnext_tiny", pretrained=False, options=dict(drop_path_rate=0.2)
)
