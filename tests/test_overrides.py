"""Overrides: unknown keys are refused with the nearest one, values are read as their keys say."""

import re

import pytest
import torch
from detectron2.config import LazyConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from lite_detr import model_zoo
from lite_detr.errors import ConfigError
from lite_detr.overrides import apply_overrides, build, load_config

CONFIG = "dino/lite_dino_r50_h3l1_2p1x3_36ep.py"
ATTENTION = "model.encoder.layer.attention"


@pytest.mark.parametrize(
    "override, nearest",
    [
        ("train.max_itr=5", "train.max_iter"),
        ("trian.max_iter=5", "train.max_iter"),
        ("max_iter=5", "train.max_iter"),
        ("lr=1e-4", "optimizer.lr"),
        ("train.ema.enable=True", "train.ema.enabled"),
        ("data.train_jsn=a.json", "data.train_json"),
        # Behind the optimizer and the detector are those that take what they leave.
        ("optimizer.weight_decy=0", "optimizer.weight_decay"),
        ("model.num_clases=3", "model.num_classes"),
        ("model.detection_per_image=3", "model.detections_per_image"),
        (f"{ATTENTION}.num_point=4", f"{ATTENTION}.num_points"),
        (
            "dataloader.train.mapper.augmentations.70.prob=1",
            "dataloader.train.mapper.augmentations",
        ),
    ],
)
def test_a_key_that_is_not_there_is_refused_with_the_nearest(override, nearest):
    with pytest.raises(ConfigError) as error:
        load_config(CONFIG, ["train.log_period=5", override])
    key = override.partition("=")[0]
    message = str(error.value)
    assert message.startswith(f"the config has no key {key}: did you mean {nearest}")
    assert message.endswith(f"? +{key}=... would add it")


def test_one_that_is_like_none_is_refused_as_well():
    with pytest.raises(ConfigError, match=r"no key zzz: \+zzz=\.\.\. would add it$"):
        load_config(CONFIG, ["zzz=1"])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.max_iter=5", "optimizer.lr=1e-5"],
        ["dataloader.train.mapper.augmentations=[]"],
        ["dataloader.train.mapper.augmentations.0.prob=0.1"],
        # Arguments that the config leaves as they are: of a class, of its base, of a function.
        [f"{ATTENTION}.num_points=2"],
        ["model.detections_per_image=5"],
        ["optimizer.betas=[0.9,0.99]"],
        ["dataloader.train.max_unusable=0.3"],
        # Of what is called after another override alone.
        [
            "model.encoder._target_=lite_detr.modeling.DeformableEncoder",
            "model.encoder.num_layers=6",
        ],
        [
            "model.encoder.num_layers=6",
            "model.encoder._target_=lite_detr.modeling.DeformableEncoder",
        ],
        ["+train.my_own=1", "++train.other.key=2"],
    ],
)
def test_what_is_there_is_changed_as_detectron2_does(overrides):
    expected = LazyConfig.apply_overrides(model_zoo.get_config(CONFIG), overrides)
    assert load_config(CONFIG, overrides) == expected


FOLDERS = [
    "2024_01",
    "1e3",
    "true",
    "photos (1)",
    "it's",
    "~/data",
    "données/été",
    "图片/训练",
    "epoch=9-step=100.pth",
    "a,b",
    "[1]",
    "{a}",
    "C:\\data",
    " both ends ",
    "x" * 5000,
    "",
    '"',
]


@pytest.mark.parametrize("text", FOLDERS)
@pytest.mark.parametrize(
    "key",
    [
        "train.output_dir",
        # Null in the config, and an argument that it does not have.
        "data.train_json",
        "dataloader.evaluator.output_dir",
    ],
)
def test_text_is_taken_as_typed(key, text):
    assert OmegaConf.select(load_config(CONFIG, [f"{key}={text}"]), key) == text


@pytest.mark.parametrize(
    "override, value",
    [
        ("train.output_dir='a b'", "a b"),
        ('train.output_dir="null"', "null"),
        ("train.init_checkpoint=null", None),
        ("data.val_json=null", None),
        ("train.output_dir=run_${train.seed}", "run_42"),
        (r"train.output_dir=\${x}", "${x}"),
        ("train.max_iter=${train.eval_period}", 5000),
        ("train.max_iter= 7 ", 7),
        ("train.max_iter=10_000", 10000),
        ("train.checkpointer.max_to_keep=null", None),
        ("optimizer.lr=1", 1),
        ("train.amp.enabled=TRUE", True),
        ("train.amp.enabled=0", False),
        ("train.ema={enabled:true}", {"enabled": True, "decay": 0.9997}),
        ("model.denoising=null", None),
        ("model.in_features=[res4,res5]", ["res4", "res5"]),
        ("dataloader.test.dataset.names=[2024_01, é b, it's]", ["2024_01", "é b", "it's"]),
        # The config has a list of numbers, and what is called takes one number as well.
        ("dataloader.test.mapper.augmentations.0.short_edge_length=[1,2]", [1, 2]),
        ("dataloader.train.mapper.augmentations.2.short_edge_length=640", 640),
        ("optimizer.params.lr_factor_func.factors={neck.:0.5}", {"backbone.": 0.1, "neck.": 0.5}),
        # What is added may be anything, and text where it is nothing else.
        ("+my.tag=2024_01", "2024_01"),
        ("+my.tag=photos (1)", "photos (1)"),
        ("+my.tag=[1,2]", [1, 2]),
        ("+my.tag=1e-4", 1e-4),
        ("+train.max_iter=soon", "soon"),
    ],
)
def test_a_key_says_how_its_value_is_read(override, value):
    key = override.partition("=")[0].lstrip("+")
    found = OmegaConf.select(load_config(CONFIG, [override]), key)
    assert found == value and type(found) in (type(value), DictConfig, ListConfig)


@pytest.mark.parametrize(
    "override, problem",
    [
        ("train.max_iter", "train.max_iter is not key=value"),
        ("=5", "=5 is not key=value"),
        ("--resume", "--resume is not key=value.* put options of the program before it"),
        ("~train.max_iter", "~train.max_iter: a key cannot be deleted"),
        ("train.max_iter=[1", r"train.max_iter takes a whole number, got \[1"),
        ("train.max_iter=1e1", "train.max_iter takes a whole number, got 1e1"),
        ("train.max_iter=", "got ''"),
        ("train.max_iter=1\n2", r"got '1\\n2'"),
        ("train.max_iter=true", "takes a whole number, got true"),
        ("train.max_iter=null", "takes a whole number, got null"),
        ("train.max_iter=" + "9" * 5000, r"takes a whole number, got 9+\.\.\.$"),
        ("train.max_iter=${train.max_itr}", "'train.max_itr' not found"),
        ("train.max_iter=${train.output_dir}", "takes a whole number, got .*, which is ./output"),
        ("train.output_dir=${", r"cannot be applied: .* is written \\\${"),
        ("train.output_dir=???", "cannot be set: OmegaConf takes it for a missing value"),
        ("train.max\nit=1", r"no key 'train.max\\nit': did you mean"),
        ("train.output_dir=null", "takes text, got null: for the word, put it in quotes"),
        ("train.max_iter.of=1", "no key train.max_iter.of: did you mean train.max_iter"),
        ("optimizer.lr=1e-4x", "optimizer.lr takes a number, got 1e-4x"),
        ("optimizer.lr=nan", "optimizer.lr takes a number, got nan"),
        ("optimizer.betas=0.9,0.99", "optimizer.betas takes a list of numbers, got 0.9,0.99"),
        ("optimizer.options=1", "no key optimizer.options"),
        ("train.amp.enabled=no", "train.amp.enabled takes true or false, got no"),
        ("train.ema=true", "train.ema takes keys and values"),
        ("train.ema={enable:true}", "no key train.ema.enable: did you mean train.ema.enabled"),
        (
            "data.val_json.x=1",
            r"data.val_json is null and has no keys; \+data.val_json.x=...",
        ),
        ("model.backbone=swin_tiny", "model.backbone takes keys and values"),
        ("model.in_features=res4", r"takes a list such as \[a,b\] or null, got res4"),
        ("model.pixel_mean=[a,b,c]", "takes a list of numbers, got"),
        ("dataloader.test.dataset.names=[a", "is not a list such as .* in quotes"),
        ("dataloader.train.mapper.augmentations.2.max_size=wide", "max_size takes a number or"),
        ("+my.tag=[1", r"my.tag=\[1 cannot be read .*in quotes, as in 'my.tag=\"text\"'"),
        ("+train.max_iter.of=1", "train.max_iter is a value and has no keys"),
        (f"{ATTENTION}._target_=lite_detr.Plain", "there is no lite_detr.Plain"),
        ("model.encoder={_target_:lite_detr.Plain}", "there is no lite_detr.Plain"),
    ],
)
def test_what_cannot_be_read_or_made_is_one_line(override, problem):
    with pytest.raises(ConfigError, match=problem) as error:
        load_config(CONFIG, [override])
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_config_of_ones_own_may_call_anything():
    cfg = OmegaConf.create({"model": {"_target_": "builtins.dict", "a": 1}})
    assert apply_overrides(cfg, ["model.b=2"]).model.b == 2


@pytest.mark.parametrize(
    "override, key, problem",
    [
        ("model.encoder.layer.attention.num_heads=3", "model", "embed_dim must be a multiple of"),
        ("model.encoder.num_high_levels=4", "model", "num_high_levels must leave at least one"),
        ("lr_multiplier.milestones=[40,10]", "lr_multiplier", "lr_multiplier of the config cannot"),
    ],
)
def test_a_value_that_a_part_refuses_is_one_line(override, key, problem):
    with pytest.raises(ConfigError, match=problem):
        build(load_config(CONFIG, [override]), key)


def test_a_learning_rate_that_the_optimizer_refuses_is_one_line():
    cfg = load_config(CONFIG, ["optimizer.lr=-1"])
    cfg.optimizer.params = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(ConfigError, match="optimizer of the config cannot be built: Invalid learn"):
        build(cfg, "optimizer")


def test_a_saved_config_names_its_parts_where_they_are_imported_from(tmp_path):
    """So that configs saved by earlier versions load after a class has moved to another file."""
    LazyConfig.save(load_config(CONFIG, []), str(tmp_path / "config.yaml"))
    targets = set(re.findall(r"lite_detr\.[\w.]+", (tmp_path / "config.yaml").read_text()))
    moved = {target for target in targets if target.startswith("lite_detr.modeling.")}
    assert moved == {f"lite_detr.modeling.{target.rpartition('.')[2]}" for target in moved}
    assert "lite_detr.modeling.HungarianMatcher" in moved
