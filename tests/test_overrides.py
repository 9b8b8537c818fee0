"""Keys of overrides that the config does not have are refused, with the nearest one."""

import pytest
from detectron2.config import LazyConfig
from omegaconf import OmegaConf

from lite_detr import model_zoo
from lite_detr.model_zoo import ConfigError
from lite_detr.overrides import apply_overrides, load_config

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


@pytest.mark.parametrize(
    "override, problem",
    [
        ("train.max_iter", "train.max_iter is no key=value"),
        ("--resume", "--resume is no key=value.* give options of the program before it"),
        ("train.max_iter=[1", r"train.max_iter=\[1 cannot be applied: no viable alternative"),
        ("~train.max_iter", "~train.max_iter cannot be applied: deletion is not yet a supported"),
        ("train.max_iter.of=1", "no key train.max_iter.of: did you mean train.max_iter"),
        (f"{ATTENTION}._target_=lite_detr.Plain", "there is no lite_detr.Plain"),
    ],
)
def test_what_cannot_be_read_or_made_is_one_line(override, problem):
    with pytest.raises(ConfigError, match=problem) as error:
        load_config(CONFIG, [override])
    assert "\n" not in str(error.value)


def test_a_config_of_ones_own_may_call_anything():
    cfg = OmegaConf.create({"model": {"_target_": "builtins.dict", "a": 1}})
    assert apply_overrides(cfg, ["model.b=2"]).model.b == 2
