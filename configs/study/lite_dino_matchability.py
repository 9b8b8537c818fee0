from ..common.recipes import use_matchability
from .lite_dino import data, dataloader, lr_multiplier, model, optimizer, train

use_matchability(model)
