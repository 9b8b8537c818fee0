from ..common.recipes import use_rank
from .lite_dino_efficientnet_lite0 import data, dataloader, lr_multiplier, model, optimizer, train

# Its authors' cost is of high order from the fifth of twelve epochs on.
use_rank(model, start_iter=train.max_iter * 5 // 12)
