"""A YAML config's number of classes is compared with its datasets before training."""

import json

import detectron2.engine.defaults
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model

from lite_detr.errors import ConfigError


@pytest.fixture
def pets(tmp_path):
    """A dataset that is registered as in Detectron2's tutorial, which nothing has read yet."""
    path = tmp_path / "pets.json"
    kinds = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    images = [{"id": 1, "file_name": "a.jpg", "width": 10, "height": 10}]
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": kinds}))
    register_coco_instances("yaml_pets", {}, str(path), str(tmp_path))
    yield "yaml_pets"
    DatasetCatalog.pop("yaml_pets")
    MetadataCatalog.pop("yaml_pets")


def build_optimizer(cfg):
    """As ``DefaultTrainer`` does before it builds its loader; returns the detector."""
    model = build_model(cfg)
    detectron2.engine.defaults.build_optimizer(cfg, model)
    return model


@pytest.mark.parametrize(("key", "heads", "hint"), [("TRAIN", 80, False), ("TEST", 2, True)])
def test_another_number_is_refused_with_the_key_to_set(key, heads, hint, tiny, pets):
    cfg = tiny
    cfg.DATASETS[key] = (pets,)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = heads
    with pytest.raises(ConfigError) as raised:
        build_optimizer(cfg)
    message = str(raised.value)
    assert f"'yaml_pets' (DATASETS.{key}) has 2 classes and the detector 10" in message
    assert "set MODEL.DETR.NUM_CLASSES to 2" in message
    assert ("MODEL.ROI_HEADS.NUM_CLASSES, which is 2, is for other" in message) is hint


def test_the_detector_gets_the_names_for_its_checkpoints(tiny, pets):
    tiny.MODEL.DETR.NUM_CLASSES = 2
    tiny.DATASETS.TRAIN, tiny.DATASETS.TEST = (pets,), ()
    assert build_optimizer(tiny).class_names == ("cat", "dog")
    tiny.DATASETS.TRAIN = ()
    assert build_optimizer(tiny).class_names is None
