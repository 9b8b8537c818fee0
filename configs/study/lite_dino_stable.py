from ..common.recipes import use_stable
from .lite_dino import data, dataloader, lr_multiplier, model, optimizer, train

use_stable(model)
