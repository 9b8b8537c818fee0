from torchvision.models import ResNet101_Weights

from .resnet50 import backbone

backbone.stages.depth = 101
# torchvision's own file, which lite_detr's checkpointer converts.
init_checkpoint = ResNet101_Weights.IMAGENET1K_V1.url
