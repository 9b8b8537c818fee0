from ..common.swin import swin
from .dino_swin_l_4scale_36ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone = swin("l", images=384, stride_4=True)
model.in_features = ["p0", "p1", "p2", "p3"]
model.num_levels = 5
