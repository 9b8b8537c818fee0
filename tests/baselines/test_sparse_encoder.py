"""Sparse DETR's encoder, under its own detector and under others."""

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from small_detectors import TinyBackbone, shrink, small_inputs

from lite_detr import model_zoo
from lite_detr.baselines import SparseEncoder
from lite_detr.baselines.sparse_encoder import spread_attention
from lite_detr.errors import ConfigError
from lite_detr.modeling.scales import Scales

FULL = {"dino": "dino/dino_r50_4scale_36ep.py", "h_detr": "h_detr/h_detr_r50_36ep.py"}


def small_model(name, keep_ratio=0.3):
    make_sparse = model_zoo.get_fields("common/models/sparse_detr.py", "make_sparse")["make_sparse"]
    model = model_zoo.get_config(name).model
    model.backbone = L(TinyBackbone)()
    model.encoder.layer.dropout = 0.0
    if "keep_ratio" not in model.encoder:
        make_sparse(model, keep_ratio)
    shrink(model)
    torch.manual_seed(0)
    return instantiate(model)


@pytest.mark.parametrize("name", FULL)
def test_under_other_detectors_every_weight_trains(name):
    model = small_model(FULL[name])
    losses = model(small_inputs(2, 1, height=128, width=192))
    assert losses["loss_mask_prediction"] > 0
    sum(losses.values()).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name


def test_only_the_best_tokens_of_each_image_change_whatever_the_other_image_is():
    model = small_model("baselines/sparse_detr_r50_rho03_50ep.py").eval()
    images = [torch.rand(3, 64, 96) * 255, torch.rand(3, 40, 64) * 255]
    tokens, pos, scales = model.make_tokens(
        model.preprocess_images([{"image": image} for image in images])
    )
    with torch.no_grad():
        memory = model.encoder(tokens, pos, scales)
        scores = model.encoder.select(tokens, pos, scales).scores
    for index in range(2):
        valid = ~scales.padding_mask[index]
        kept = int(valid.sum() * 0.3) + 1
        changed = (memory[index] != tokens[index]).any(-1)
        best = scores[index].masked_fill(~valid, float("-inf")).topk(kept).indices
        assert changed.nonzero().flatten().tolist() == sorted(best.tolist())


@pytest.mark.parametrize("keep_ratio", [0.0, -0.1, 1.5])
def test_a_keep_ratio_out_of_range_is_refused(keep_ratio):
    layer = small_model("baselines/sparse_detr_r50_rho03_50ep.py").encoder.layers[0]
    with pytest.raises(ConfigError, match=f"keep_ratio.*{keep_ratio}"):
        SparseEncoder(layer, keep_ratio=keep_ratio)


def test_attention_is_spread_over_the_cells_around_a_location():
    mask = torch.zeros(1, 2, 3, dtype=torch.bool)
    scales = Scales.from_masks([mask], False, torch.float64)
    # At (1.25, 0.5) cells, and at (2.5, 1.0), of which half falls outside.
    locations = torch.tensor([[1.25 / 3, 0.25], [2.5 / 3, 0.5]], dtype=torch.float64)
    locations = locations.view(1, 2, 1, 1, 1, 2)
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64).view(1, 2, 1, 1, 1)
    looks = spread_attention(locations, weights, scales).view(2, 3)
    expected = [[0.0, 0.375, 0.125], [0.0, 0.375, 0.125 + 1.0]]
    torch.testing.assert_close(looks, torch.tensor(expected, dtype=torch.float64))
