"""SOLVER stands for the optimizer and the schedule of the lazy configs."""

import detectron2.engine.defaults
import detectron2.solver
import pytest
import torch
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch import nn

from lite_detr import model_zoo
from lite_detr.optimizer import ClippedAdamW

NAMES = [
    "deformable_detr/lite_deformable_detr_r50_h3l1_2p1x3_50ep.yaml",
    "dino/lite_dino_r50_h3l1_2p1x3_36ep.yaml",
    "h_detr/h_detr_swin_t_36ep.yaml",
]


def build_optimizer(cfg, model):
    """As ``DefaultTrainer`` does."""
    return detectron2.engine.defaults.build_optimizer(cfg, model)


def groups(optimizer, model):
    """Each group's options, and the names of its parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        {k: v for k, v in group.items() if k != "params"} | {"names": [names[p] for p in params]}
        for group in optimizer.param_groups
        for params in [group["params"]]
    ]


@pytest.mark.parametrize("name", NAMES)
def test_parameter_groups_are_those_of_the_lazy_config(name, tiny):
    """Names of another detector would do: factors go by parts of names."""
    model = build_model(tiny)
    cfg = model_zoo.get_yaml_config(name)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    lazy = model_zoo.get_config(name.replace(".yaml", ".py")).optimizer
    lazy.params.model = model
    given, expected = build_optimizer(cfg, model), instantiate(lazy)
    assert type(given) is type(expected) is ClippedAdamW
    assert given.clip_norm == expected.clip_norm == 0.1
    assert groups(given, model) == groups(expected, model)
    rates = {n: group["lr"] for group in groups(given, model) for n in group["names"]}
    base = cfg.SOLVER.BASE_LR
    assert rates["encoder.layers.0.ffn.linear1.weight"] == base
    assert rates["backbone.res5.0.conv1.weight"] == pytest.approx(base / 10)
    # DINO alone does without a rate of their own.
    offsets = base if name.startswith("dino/") else pytest.approx(base / 10)
    assert rates["encoder.layers.0.self_attn.sampling_offsets.weight"] == offsets


def test_a_step_moves_the_weights_as_with_the_lazy_config(tiny, lazy_tiny, batch):
    """Gradients are clipped alike, too."""
    torch.manual_seed(2)
    models = [build_model(tiny), instantiate(lazy_tiny.model)]
    models[1].load_state_dict(models[0].state_dict())
    lazy_tiny.optimizer.params.model = models[1]
    optimizers = [build_optimizer(tiny, models[0]), instantiate(lazy_tiny.optimizer)]
    for model, optimizer in zip(models, optimizers):
        torch.manual_seed(3)
        sum(model(batch).values()).backward()
        optimizer.step()
    for (name, given), expected in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.equal(given, expected), name


@pytest.mark.parametrize("name", NAMES)
def test_the_schedule_is_that_of_the_lazy_config(name):
    cfg = model_zoo.get_yaml_config(name)
    lazy = model_zoo.get_config(name.replace(".yaml", ".py"))
    multiplier = instantiate(lazy.lr_multiplier)
    assert isinstance(multiplier, MultiStepParamScheduler)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_lr_scheduler(cfg, optimizer)
    drop = cfg.SOLVER.STEPS[0]
    for step in (0, 1, drop - 1, drop, cfg.SOLVER.MAX_ITER - 1):
        expected = multiplier(step / lazy.train.max_iter)
        assert schedule._multiplier(step / cfg.SOLVER.MAX_ITER) == expected, step


def test_options_of_the_solver_are_followed(tiny):
    solver = tiny.SOLVER
    solver.BASE_LR, solver.WEIGHT_DECAY = 0.01, 0.2
    solver.WEIGHT_DECAY_NORM, solver.WEIGHT_DECAY_BIAS = 0.0, 0.3
    solver.BIAS_LR_FACTOR = 2.0
    solver.LR_FACTORS = [["backbone.", 0.5], ["decoder.", 0.25]]
    model = build_model(tiny)
    by_name = {
        name: (group["lr"], group["weight_decay"])
        for group in groups(build_optimizer(tiny, model), model)
        for name in group["names"]
    }
    assert by_name["backbone.res5.0.conv1.weight"] == (0.005, 0.2)
    assert by_name["decoder.layers.0.ffn.linear1.weight"] == (0.0025, 0.2)
    assert by_name["encoder.layers.0.norm.weight"] == (0.01, 0.0)
    assert by_name["encoder.layers.0.ffn.linear1.bias"] == (0.02, 0.3)
    assert by_name["level_embed"] == (0.01, 0.2)


def test_gradients_can_be_clipped_in_detectron2s_ways_or_not_at_all(tiny):
    model = build_model(tiny)
    clip = tiny.SOLVER.CLIP_GRADIENTS
    clip.CLIP_TYPE, clip.CLIP_VALUE = "value", 0.01
    optimizer = build_optimizer(tiny, model)
    assert isinstance(optimizer, torch.optim.AdamW) and not isinstance(optimizer, ClippedAdamW)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 5.0)
    optimizer.step()
    assert torch.equal(model.level_embed.grad, torch.full_like(model.level_embed, 0.01))
    clip.ENABLED = False
    assert type(build_optimizer(tiny, model)) is torch.optim.AdamW


def test_another_norm_over_all_parameters_is_refused(tiny):
    model = build_model(tiny)
    tiny.SOLVER.CLIP_GRADIENTS.NORM_TYPE = 1.0
    with pytest.raises(ValueError, match="NORM_TYPE is 1.0; CLIP_TYPE full_model accepts 2.0"):
        build_optimizer(tiny, model)


def test_other_models_keep_detectron2s_optimizer():
    optimizer = detectron2.solver.build_optimizer(get_cfg(), nn.Linear(2, 2))
    assert type(optimizer) is torch.optim.SGD


def test_a_detector_in_a_wrapper_is_a_detector(tiny):
    model = build_model(tiny)
    wrapped = nn.Module()
    wrapped.module = model
    optimizer = detectron2.solver.build_optimizer(tiny, wrapped)
    assert type(optimizer) is ClippedAdamW
    assert [len(g["params"]) for g in optimizer.param_groups] == [
        len(g["params"]) for g in build_optimizer(tiny, model).param_groups
    ]
