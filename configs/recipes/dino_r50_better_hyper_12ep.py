import copy

from detectron2.config import LazyCall as L

from lite_detr.modeling import CriteriaByOutput

from ..common.schedule import warm_up
from ..dino.dino_r50_4scale_12ep import data, dataloader, lr_multiplier, model, optimizer, train

# detrex's better hyper-parameters: no frozen stage, more denoising queries, and twice the class
# weight but for those queries.
model.backbone.freeze_at = 0
model.denoising.num_queries = 300
denoising = copy.deepcopy(model.criterion)
model.criterion.weight_class = 2.0
model.criterion = L(CriteriaByOutput)(layers=model.criterion, denoising=denoising)
lr_multiplier = warm_up(lr_multiplier, train)
train.ema.enabled = True
