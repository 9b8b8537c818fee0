"""Learning rates by parameter name."""

import pytest
from detectron2.modeling import SwinTransformer, ViT
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from lite_detr.errors import ConfigError
from lite_detr.optimizer import LayerDecay


class Model(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.decoder = nn.Linear(2, 2)
        self.sampling_offsets = nn.Linear(2, 2)


def learning_rates(backbone, depths):
    model = Model(backbone)
    factors = LayerDecay(0.5, depths, {"sampling_offsets": 0.1})
    groups = get_default_optimizer_params(model, base_lr=1.0, lr_factor_func=factors)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    return {name: rates[id(p)] for name, p in model.named_parameters()}


def test_rates_fall_block_by_block_in_a_swin_transformer():
    """Over all stages: three blocks, so that the patches are four steps from the end."""
    swin = SwinTransformer(embed_dim=4, depths=[1, 2], num_heads=[1, 1], out_indices=(0, 1))
    rates = learning_rates(swin, [1, 2])
    expected = {
        "decoder.weight": 1.0,
        "sampling_offsets.bias": 0.1,
        "backbone.norm1.weight": 1.0,
        "backbone.layers.1.blocks.1.mlp.fc1.weight": 0.5,
        "backbone.layers.1.blocks.0.attn.qkv.bias": 0.25,
        "backbone.layers.0.downsample.reduction.weight": 0.125,
        "backbone.layers.0.blocks.0.norm1.weight": 0.125,
        "backbone.patch_embed.proj.weight": 0.0625,
    }
    assert {name: rates[name] for name in expected} == pytest.approx(expected)


def test_rates_fall_block_by_block_in_a_vit():
    vit = ViT(img_size=32, embed_dim=8, depth=2, num_heads=2, out_feature="last_feat")
    rates = learning_rates(vit, [2])
    assert rates["backbone.blocks.1.norm1.weight"] == 0.5
    assert rates["backbone.blocks.0.norm1.weight"] == 0.25
    assert rates["backbone.pos_embed"] == rates["backbone.patch_embed.proj.bias"] == 0.125


@pytest.mark.parametrize(
    "name, message",
    [
        ("backbone.layers.1.blocks.2.norm1.weight", "depths"),
        ("backbone.layers.2.blocks.0.norm1.weight", "depths"),
        ("backbone.res2.0.conv1.weight", "does not know the blocks"),
    ],
)
def test_other_backbones_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        LayerDecay(0.5, [2, 2])(name)


def test_a_decay_that_would_stop_learning_is_refused():
    with pytest.raises(ConfigError, match="above 0"):
        LayerDecay(0.0, [2])
