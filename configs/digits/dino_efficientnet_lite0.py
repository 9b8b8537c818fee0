from ..common.digits import data, dataloader, lr_multiplier, optimizer, small, train
from ..common.models.dino import model

small(model)
model.denoising.num_queries = 100
model.criterion.weight_class = 2.0
