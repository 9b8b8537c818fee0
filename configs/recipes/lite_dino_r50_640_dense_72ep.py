from ..common.recipes import use_dense
from .lite_dino_r50_640_72ep import data, dataloader, lr_multiplier, model, optimizer, train

use_dense(dataloader)
