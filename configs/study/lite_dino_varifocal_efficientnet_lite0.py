from detectron2.config import LazyCall as L

from lite_detr.modeling import VarifocalLoss

from .lite_dino_efficientnet_lite0 import data, dataloader, lr_multiplier, model, optimizer, train

# RT-DETR's loss.
model.criterion.class_loss = L(VarifocalLoss)()
model.criterion.weight_class = 1.0
