"""A lite detector small enough to train in a test; it inherits from the zoo as a user's would."""

from lite_detr import model_zoo

from ..small_detectors import shrink

_base = model_zoo.get_config("deformable_detr/lite_deformable_detr_r50_h3l1_2p1x3_50ep.py")
data, dataloader, lr_multiplier, model, optimizer, train = (
    _base[name] for name in ("data", "dataloader", "lr_multiplier", "model", "optimizer", "train")
)

shrink(model)

for _split in (dataloader.train, dataloader.test):
    _split.mapper.augmentations = []
    _split.num_workers = 0
dataloader.train.total_batch_size = 2

train.device = "cpu"
train.init_checkpoint = ""
train.max_iter = 2
train.eval_period = 2
train.log_period = 1
