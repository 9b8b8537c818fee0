from ..common.schedule import step_schedule
from ..dino.lite_dino_r50_h3l1_2p1x3_36ep import data, dataloader, model, optimizer, train

# Your own dataset on one GPU: its paths are to be given, data.train_json=... and so on. See
# docs/own_data.md.
dataloader.train.dataset.names = None
dataloader.test.dataset.names = None

# A quarter of the paper's 16 images, and a quarter of its learning rate.
dataloader.train.total_batch_size = 4
optimizer.lr = 2.5e-5
lr_multiplier = step_schedule(epochs=10, drop=8)
train.max_iter = 5000
train.eval_period = 500
train.checkpointer.period = 500
train.checkpointer.max_to_keep = 2
# The best weights are kept in model_best.pth, and training ends if AP rises no more.
train.best.metric = "bbox/AP"
train.early_stopping.patience = 4
