from functools import partial

from detectron2.config import LazyCall as L
from detectron2.modeling import MViT
from torch import nn

backbone = L(MViT)(
    embed_dim=96,
    depth=10,
    num_heads=1,
    last_block_indexes=[0, 2, 7, 9],
    drop_path_rate=0.2,
    norm_layer=partial(nn.LayerNorm, eps=1e-6),
    out_features=["scale3", "scale4", "scale5"],
)
init_checkpoint = "detectron2://ImageNetPretrained/mvitv2/MViTv2_T_in1k.pyth"
