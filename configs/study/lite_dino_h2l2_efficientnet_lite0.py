from ..common.models.lite import make_lite
from .dino_efficientnet_lite0 import data, dataloader, lr_multiplier, model, optimizer, train

make_lite(model, "H2L2-(2+1)x3")
