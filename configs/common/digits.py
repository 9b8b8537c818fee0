from .backbones.efficientnet_lite0 import backbone, pixel_mean, pixel_std
from .data.custom import data
from .data.digits import dataloader
from .optimizer import optimizer
from .schedule import cosine_schedule
from .train import train

# Some minutes on two CPU cores; a longer training reaches more.
dataloader.train.total_batch_size = 4
optimizer.lr = 1.6e-3
optimizer.clip_norm = 1.0
# Digits look little like what ImageNet taught the backbone.
optimizer.params.lr_factor_func.factors = {"backbone.": 0.5}
lr_multiplier = cosine_schedule(warmup=0.05)
train.max_iter = 450
train.eval_period = 225
train.checkpointer.period = 225


def small(model):
    """Sizes a detector for images of some 250 pixels a side: 5 M parameters."""
    model.backbone = backbone
    # The fine maps are most of the work of a backbone, above all on the way back.
    model.backbone.frozen_stride = 8
    model.pixel_mean = pixel_mean
    model.pixel_std = pixel_std
    model.num_classes = 10
    model.embed_dim = 128
    model.encoder.num_layers = 2
    model.encoder.layer.attention.num_heads = 4
    model.encoder.layer.ffn.hidden_dim = 512
    model.encoder.layer.dropout = 0.0
    model.queries.num_queries = 200
    model.decoder.heads.num_layers = 3
    # After so few iterations, nearly all false boxes are second ones on an object, with scores in
    # the middle. The paper's exponent, 2, hardly counts them.
    model.criterion.gamma = 0.5
    model.detections_per_image = 100
