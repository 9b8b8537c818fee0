from torchvision.models import ResNet18_Weights

from .resnet50 import backbone

backbone.stages.depth = 18
del backbone.stages.stride_in_1x1  # basic blocks have no 1x1 convolution
# torchvision's own file, which lite_detr's checkpointer converts.
init_checkpoint = ResNet18_Weights.IMAGENET1K_V1.url
