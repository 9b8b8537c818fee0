from ..common.recipes import use_align
from .lite_dino import data, dataloader, lr_multiplier, model, optimizer, train

use_align(model)
