from ..common.recipes import use_matchability
from .lite_dino_efficientnet_lite0 import data, dataloader, lr_multiplier, model, optimizer, train

use_matchability(model)
