"""A YAML config stands for the lazy config beside it, and says what it cannot stand for."""

import inspect
import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import get_cfg, instantiate
from detectron2.data import MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, Backbone, build_model
from omegaconf import OmegaConf

import lite_detr
from lite_detr import add_lite_detr_config, model_zoo
from lite_detr.modeling import (
    DINO,
    DeformableEncoder,
    InterleavedEncoder,
    KeyAwareDeformableAttention,
    MultiScaleDeformableAttention,
    TimmBackbone,
    TorchvisionBackbone,
)
from lite_detr.yacs.model import backbone_from_config, lazy_model, share_log_handlers

YAML = model_zoo.list_configs(".yaml")
LITE_DINO = "dino/lite_dino_r50_h3l1_2p1x3_36ep.yaml"
SWIN = "dino/dino_swin_t_36ep.yaml"


def model_of(cfg):
    return lazy_model(cfg, META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE))


def branches(model):
    """All of a lazy model but its backbone."""
    tree = OmegaConf.to_container(model, resolve=True)
    del tree["backbone"]
    return tree


@pytest.mark.parametrize("name", YAML)
def test_a_yaml_file_says_what_the_lazy_one_of_its_name_says(name):
    cfg = model_zoo.get_yaml_config(name)
    lazy = model_zoo.get_config(name.replace(".yaml", ".py"))
    assert branches(model_of(cfg)) == branches(lazy.model)
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert (
        lazy.train.max_iter,
        lazy.train.eval_period,
        lazy.train.seed,
    ) == (cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, cfg.SEED)
    loader = lazy.dataloader.train
    assert loader.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert (loader.dataset.names,) == cfg.DATASETS.TRAIN
    assert (lazy.dataloader.test.dataset.names,) == cfg.DATASETS.TEST
    assert loader.dataset.filter_empty == cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    assert loader.mapper.image_format == cfg.INPUT.FORMAT
    resize = loader.mapper.augmentations[-1]
    assert list(cfg.INPUT.MIN_SIZE_TRAIN) == list(resize.short_edge_length)
    assert resize.max_size == cfg.INPUT.MAX_SIZE_TRAIN
    resize = lazy.dataloader.test.mapper.augmentations[-1]
    assert (
        resize.short_edge_length,
        resize.max_size,
    ) == (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)


def test_the_main_rows_have_yaml_files_of_a_few_lines():
    folders = [name.split("/")[0] for name in YAML]
    assert min(folders.count(folder) for folder in ("deformable_detr", "dino", "h_detr")) >= 3
    for name in YAML:
        lines = Path(model_zoo.get_config_file(name)).read_text().splitlines()
        assert len(lines) <= 12, name


@pytest.mark.parametrize("name", [LITE_DINO, SWIN, "h_detr/lite_h_detr_r50_h3l1_2p1x3_36ep.yaml"])
def test_the_same_seed_makes_the_same_weights(name):
    pytest.importorskip("timm")  # Detectron2's Swin takes its stochastic depth from there
    cfg = model_zoo.get_yaml_config(name)
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(1)
    model = build_model(cfg)
    torch.manual_seed(1)
    lazy = instantiate(model_zoo.get_config(name.replace(".yaml", ".py")).model)
    given, expected = model.state_dict(), lazy.state_dict()
    assert list(given) == list(expected)
    for name, weight in expected.items():
        assert torch.equal(given[name], weight), name
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in lazy.named_parameters() if p.requires_grad}


def test_the_same_batch_has_the_same_losses(tiny, lazy_tiny, batch):
    torch.manual_seed(2)
    model = build_model(tiny)
    lazy = instantiate(lazy_tiny.model)
    lazy.load_state_dict(model.state_dict())
    losses = []
    for detector in (model, lazy):
        torch.manual_seed(3)
        losses.append(detector(batch))
    assert losses[0].keys() == losses[1].keys()
    for name in losses[0]:
        assert torch.equal(losses[0][name], losses[1][name]), name


def test_options_change_the_lazy_model(tiny):
    options = tiny.MODEL.DETR
    options.NUM_CLASSES, options.NUM_QUERIES = 5, 12
    options.SCORE_THRESH_TEST = 0.25
    options.IN_FEATURES = ["res4", "res5"]
    options.NUM_LEVELS = 3
    options.ENCODER = "full"
    options.ATTENTION = "deformable"
    tiny.MODEL.PIXEL_MEAN, tiny.MODEL.PIXEL_STD = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    tiny.INPUT.FORMAT = "BGR"
    model = build_model(tiny)
    assert model.num_classes == 5
    assert model.queries.num_queries == 12
    assert model.queries.class_embed.out_features == 5
    assert model.score_thresh == 0.25
    assert model.neck.in_features == ["res4", "res5"]
    assert len(model.level_embed) == 3
    assert model.pixel_mean.flatten().tolist() == [1, 2, 3]
    assert model.pixel_std.flatten().tolist() == [4, 5, 6]
    assert model.input_format == "BGR"
    assert type(model.encoder) is DeformableEncoder and len(model.encoder.layers) == 2
    layers = [*model.encoder.layers, *model.decoder.layers]
    attentions = [m for layer in layers for m in layer.modules() if hasattr(m, "num_points")]
    assert len(attentions) == 4
    assert {type(attention) for attention in attentions} == {MultiScaleDeformableAttention}


def test_the_papers_notation_names_the_encoder():
    cfg = model_zoo.get_yaml_config("dino/dino_r50_4scale_36ep.yaml")
    cfg.MODEL.DETR.ENCODER = "H2L1-(3+1)x2"
    cfg.MODEL.DETR.ATTENTION = "key_aware"
    model = model_of(cfg)
    encoder = instantiate(model.encoder)
    assert type(encoder) is InterleavedEncoder
    assert model.num_levels == 3
    assert (encoder.num_low_levels, encoder.updates_per_block) == (1, 3)
    assert len(encoder.layers) == 6 and len(encoder.low_level_ffns) == 2
    assert type(encoder.layers[0].self_attn) is KeyAwareDeformableAttention


@pytest.mark.parametrize(
    ("limit", "test", "expected"), [(None, 100, 100), (None, 7, 7), (9, 100, 9), (9, 7, 9)]
)
def test_detections_per_image_are_those_of_test_unless_the_detector_says_otherwise(
    tiny, limit, test, expected
):
    tiny.MODEL.DETR.DETECTIONS_PER_IMAGE = limit
    tiny.TEST.DETECTIONS_PER_IMAGE = test
    assert model_of(tiny).detections_per_image == expected


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("NUM_QUERY", 100, "MODEL.DETR has no NUM_QUERY; it has DETECTOR, .*NUM_QUERIES"),
        ("ENCODER", "H3L1", r"ENCODER: 'H3L1' is not .*'H3L1-\(2\+1\)x3'.* is 'full'"),
        ("ATTENTION", "kda", "'kda'; accepted are deformable, key_aware"),
        ("DETECTOR", "dino/dino_r50_4scale_36ep.py", "is a DINO, .* says DeformableDETR"),
        ("DETECTOR", "dino/dino_r50_4scale_36ep.yaml", "YAML file, and a lazy config"),
    ],
)
def test_what_is_not_understood_is_named_with_what_is(tiny, key, value, message):
    tiny.MODEL.DETR[key] = value
    with pytest.raises(ValueError, match=message):
        model_of(tiny)


def test_levels_that_contradict_the_notation_are_refused(tiny):
    tiny.MODEL.DETR.ENCODER, tiny.MODEL.DETR.NUM_LEVELS = "H3L1-(2+1)x3", 5
    with pytest.raises(ValueError, match="has 4 scales, MODEL.DETR.NUM_LEVELS says 5"):
        model_of(tiny)


@pytest.mark.parametrize("key", ["MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS"])
def test_other_tasks_are_refused(tiny, key):
    tiny.merge_from_list([key, True])
    with pytest.raises(ValueError, match=f"detects boxes and cannot .*: set {key} to False"):
        build_model(tiny)


def test_panoptic_datasets_are_refused(tiny):
    name = "coco_2017_val_panoptic_separated"
    assert MetadataCatalog.get(name).evaluator_type == "coco_panoptic_seg"
    tiny.DATASETS.TEST = (name,)
    with pytest.raises(ValueError, match=f"{name}.*'coco_panoptic_seg', and .*: name a det"):
        build_model(tiny)


def test_a_config_without_our_keys_is_told_how_to_get_them():
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "DINO"
    with pytest.raises(ValueError, match=r"call lite_detr.add_lite_detr_config\(cfg\)"):
        build_model(cfg)


def test_adding_the_keys_twice_keeps_what_was_set():
    cfg = get_cfg()
    lite_detr.add_lite_detr_config(cfg)
    cfg.MODEL.DETR.NUM_CLASSES = 4
    add_lite_detr_config(cfg)
    assert cfg.MODEL.DETR.NUM_CLASSES == 4


def test_the_keys_of_another_project_are_not_overwritten():
    cfg = get_cfg()
    cfg.MODEL.DETR = type(cfg)({"NHEADS": 8})
    with pytest.raises(ValueError, match=r"MODEL.DETR of another project, with \['NHEADS'\]"):
        add_lite_detr_config(cfg)


def test_keys_can_be_set_on_the_command_line(tiny):
    tiny.merge_from_list(
        ["MODEL.DETR.NUM_QUERIES", "30", "MODEL.DETR.IN_FEATURES", "['res3', 'res4', 'res5']"]
        + ["SOLVER.LR_FACTORS", "[['backbone.', 0.5]]", "MODEL.TIMM.MODEL_NAME", "resnet18"]
    )
    assert tiny.MODEL.DETR.NUM_QUERIES == 30
    assert tiny.MODEL.DETR.IN_FEATURES == ["res3", "res4", "res5"]
    assert tiny.SOLVER.LR_FACTORS == [["backbone.", 0.5]]
    assert tiny.MODEL.TIMM.MODEL_NAME == "resnet18"


def test_a_dumped_config_can_be_loaded_again(tiny, tmp_path):
    (tmp_path / "config.yaml").write_text(tiny.dump())
    again = model_zoo.get_yaml_config(str(tmp_path / "config.yaml"))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(tiny.dump())


def test_a_meta_architecture_of_ones_own_starts_from_its_parents_config(tiny):
    class Own(DINO):
        pass

    cfg = model_zoo.get_yaml_config(LITE_DINO)
    assert branches(lazy_model(cfg, Own)) == branches(model_of(cfg))


def test_a_backbone_of_ones_own_needs_no_more_than_its_name(tiny):
    @BACKBONE_REGISTRY.register()
    class OwnBackbone(Backbone):
        def __init__(self, cfg, input_shape):
            super().__init__()
            self._out_features = ["a", "b", "c"]
            self._out_feature_strides = {"a": 8, "b": 16, "c": 32}
            self._out_feature_channels = {"a": 3, "b": 5, "c": 7}

        def forward(self, images):
            sizes = [(s, images.shape[-2] // s, images.shape[-1] // s) for s in (8, 16, 32)]
            return {
                name: images.new_zeros(len(images), self._out_feature_channels[name], *size[1:])
                for name, size in zip("abc", sizes)
            }

    tiny.MODEL.BACKBONE.NAME = "OwnBackbone"
    model = build_model(tiny).eval()
    assert [conv[0].in_channels for conv in model.neck.lateral_convs] == [3, 5, 7]
    assert len(model([{"image": torch.zeros(3, 64, 64)}])[0]["instances"]) > 0


def test_a_backbone_of_the_model_zoo_is_found_by_name(tiny, caplog):
    pytest.importorskip("timm")
    tiny.MODEL.BACKBONE.NAME = "swin_tiny"
    backbone = backbone_from_config(tiny)
    assert {spec.stride for spec in backbone.output_shape().values()} == {8, 16, 32}
    assert not caplog.records


@pytest.mark.parametrize(
    "node, cls", [("TIMM", TimmBackbone), ("TORCHVISION", TorchvisionBackbone)]
)
def test_backbones_of_other_libraries_take_their_arguments_from_the_config(node, cls, tiny, batch):
    """Each key is an argument; None is the class's default, so that it is written there alone."""
    pytest.importorskip("timm")
    arguments = set(inspect.signature(cls.__init__).parameters) - {"self", "state_dict"}
    assert {key.lower() for key in tiny.MODEL[node]} == arguments
    tiny.MODEL.BACKBONE.NAME = cls.__name__
    tiny.MODEL[node].MODEL_NAME = "resnet18"
    tiny.MODEL[node].FROZEN_STRIDE = 8
    model = build_model(tiny)
    assert type(model.backbone) is cls
    assert sum(model(batch).values()).isfinite()
    parameters = dict(model.backbone.body.named_parameters())
    assert not parameters["layer2.0.conv1.weight"].requires_grad
    assert parameters["layer3.0.conv1.weight"].requires_grad


def test_images_normalised_otherwise_than_a_backbones_are_worth_a_warning(tiny, tmp_path, caplog):
    path = tmp_path / "own.py"
    path.write_text(
        "from lite_detr.model_zoo import get_config\n"
        "backbone = get_config('common/backbones/resnet50.py').backbone\n"
        "backbone.stages.depth = 18\n"
        "del backbone.stages.stride_in_1x1\n"
        "pixel_std = [1.0, 1.0, 1.0]\n"
        "input_format = 'BGR'\n"
    )
    tiny.MODEL.BACKBONE.NAME = str(path)
    backbone_from_config(tiny)
    assert "MODEL.PIXEL_STD is [58.395, 57.12, 57.375]" in caplog.text
    assert "were trained with [1.0, 1.0, 1.0]" in caplog.text
    assert "INPUT.FORMAT is RGB" in caplog.text and "trained with BGR" in caplog.text


def test_a_backbone_that_there_is_not_is_named_with_those_there_are(tiny):
    tiny.MODEL.BACKBONE.NAME = "swin_huge"
    with pytest.raises(
        ValueError, match="'swin_huge'; registered are .*build_resnet_backbone"
    ) as e:
        build_model(tiny)
    assert "TimmBackbone" in str(e.value)
    assert all(name in str(e.value) for name in model_zoo.list_backbones())


def test_a_file_without_a_backbone_is_told_what_belongs_there(tiny, tmp_path):
    path = tmp_path / "own.py"
    path.write_text("model = dict(value=42)\n")
    tiny.MODEL.BACKBONE.NAME = str(path)
    with pytest.raises(ValueError, match="own.py', a file without `backbone`: assign a LazyCall"):
        build_model(tiny)


def test_get_cfg_itself_knows_the_keys_only_where_that_is_asked_for():
    """In a process of its own, since it changes Detectron2's defaults."""
    program = (
        "from detectron2.config import get_cfg; import lite_detr; "
        "assert 'DETR' not in get_cfg().MODEL; import lite_detr.yacs.defaults; "
        "assert get_cfg().MODEL.DETR.ENCODER == ''"
    )
    path = model_zoo.CONFIG_ROOT.parents[1]
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, cwd=path)


def test_lines_go_where_detectron2s_go_unless_the_user_has_decided(monkeypatch):
    ours, theirs = logging.getLogger("lite_detr"), logging.getLogger("detectron2")
    streams = {"ours": io.StringIO(), "theirs": io.StringIO()}
    handlers = {name: logging.StreamHandler(stream) for name, stream in streams.items()}
    for handler in handlers.values():
        handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
    # As in a program: pytest's handler is the root logger's.
    monkeypatch.setattr(ours, "propagate", False)
    monkeypatch.setattr(theirs, "handlers", [handlers["theirs"]])
    monkeypatch.setattr(theirs, "level", logging.INFO)
    for own, expected in (([], "theirs"), ([handlers["ours"]], "ours")):
        monkeypatch.setattr(ours, "handlers", own)
        monkeypatch.setattr(ours, "level", logging.INFO)
        for _ in range(2):
            share_log_handlers()
        ours.info("from %s", expected)
    said = {name: stream.getvalue() for name, stream in streams.items()}
    assert said == {name: f"lite_detr INFO: from {name}\n" for name in streams}
