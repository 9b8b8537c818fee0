from detectron2.config import LazyCall as L

from lite_detr.modeling import TorchvisionBackbone

# model.backbone.weights=DEFAULT lets torchvision download its weights.
backbone = L(TorchvisionBackbone)(model_name="swin_t", weights=None)
