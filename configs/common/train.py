import torch
from detectron2 import model_zoo

train = model_zoo.get_config("common/train.py").train
train.device = "cuda" if torch.cuda.is_available() else "cpu"
if train.device == "cpu":
    # DistributedDataParallel refuses device ids for models on the CPU.
    train.ddp.device_ids = None
train.seed = 42
# Once amp.enabled, torch.autocast computes in bfloat16, or in float16 with scaled losses.
train.amp.precision = "bfloat16"
# Batches of the loader that make up an iteration; their gradients are those of one large batch.
train.accumulation = 1
# So many iterations whose loss or gradient is not finite are skipped; the next one is an error.
train.max_bad_batches = 0
# A moving average of the weights, which is evaluated besides and saved along.
train.ema = dict(enabled=False, decay=0.9997)
# In TensorBoard, at every evaluation: ground truth beside predictions on so many validation images.
train.pictures = dict(num_images=4, confidence_threshold=0.3)
# The weights of the evaluation that is best in this metric of the records, such as "bbox/AP", are
# kept in model_best.pth; None keeps none.
train.best = dict(metric=None)
# The number of evaluations in a row without a better train.best.metric that ends training; 0 never
# ends it.
train.early_stopping = dict(patience=0)
# Also write model_final.safetensors, with the config and the names of the classes, for the Hub and
# for other programs. It is written from the .pth files in a local train.output_dir.
train.safetensors = False
# Experiment trackers besides TensorBoard: a project of W&B or an experiment of MLflow turns one on.
# W&B's mode is "online" or "offline"; MLflow's uri is an address, or "sqlite:///FILE".
train.trackers = dict(
    wandb=dict(project=None, mode=None),
    mlflow=dict(experiment=None, uri=None),
)
