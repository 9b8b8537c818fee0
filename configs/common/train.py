import torch
from detectron2 import model_zoo

train = model_zoo.get_config("common/train.py").train
train.device = "cuda" if torch.cuda.is_available() else "cpu"
if train.device == "cpu":
    # DistributedDataParallel refuses device ids for models on the CPU.
    train.ddp.device_ids = None
train.seed = 42
