"""A lite detector small enough to train in a test; it inherits from the zoo as a user's would."""

from lite_detr import model_zoo

_base = model_zoo.get_config("deformable_detr/lite_deformable_detr_r50_h3l1_2p1x3_50ep.py")
data, dataloader, lr_multiplier, model, optimizer, train = (
    _base[name] for name in ("data", "dataloader", "lr_multiplier", "model", "optimizer", "train")
)

model.backbone.stages.depth = 18
del model.backbone.stages.stride_in_1x1  # basic blocks have no 1x1 convolution
model.embed_dim = 32
model.encoder.num_blocks = 1
model.encoder.layer.attention.num_heads = 4
model.encoder.layer.ffn.hidden_dim = 32
model.queries.num_queries = 10
model.decoder.heads.num_layers = 2

for _split in (dataloader.train, dataloader.test):
    _split.mapper.augmentations = []
    _split.num_workers = 0
dataloader.train.total_batch_size = 2

train.device = "cpu"
train.init_checkpoint = ""
train.max_iter = 2
train.eval_period = 2
train.log_period = 1
