from detectron2.config import LazyCall as L

from lite_detr.modeling import TimmBackbone

# model.backbone.pretrained=True lets timm download its weights.
backbone = L(TimmBackbone)(model_name="resnet50d", pretrained=False, frozen_stride=4)
