"""Two-stage Deformable DETR of the sizes of ``reference_checkpoints.small_two_stage``."""

from lite_detr import model_zoo

from ..small_detectors import shrink

_base = model_zoo.get_config("deformable_detr/deformable_detr_r50_two_stage_50ep.py")
data, dataloader, lr_multiplier, model, optimizer, train = (
    _base[name] for name in ("data", "dataloader", "lr_multiplier", "model", "optimizer", "train")
)

_backbone = model.backbone.copy()
shrink(model)
model.backbone = _backbone

for _split in (dataloader.train, dataloader.test):
    _split.mapper.augmentations = []
    _split.num_workers = 0
dataloader.train.total_batch_size = 2

train.device = "cpu"
train.init_checkpoint = ""
train.max_iter = 1
train.eval_period = 0
train.log_period = 1
optimizer.lr = 0.0
