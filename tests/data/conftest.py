"""Fixtures of the tests of COCO-format datasets."""

import copy
import json
import logging

import pytest
from coco_datasets import CONTENT, DATA_KEYS
from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import OmegaConf


@pytest.fixture(autouse=True)
def restore_catalogs():
    saved = [(catalog, dict(catalog)) for catalog in (DatasetCatalog, MetadataCatalog)]
    yield
    for catalog, entries in saved:
        catalog.clear()
        catalog.update(entries)


@pytest.fixture
def content():
    return copy.deepcopy(CONTENT)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.jpg"):
        (folder / name).touch()
    return folder


@pytest.fixture
def write(tmp_path):
    def write_json(content, name="instances.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write_json


@pytest.fixture
def warnings(monkeypatch):
    """Messages of the lite_detr logger, whatever other tests did to its handlers."""
    logger, messages = logging.getLogger("lite_detr"), []
    monkeypatch.setattr(logger, "warning", lambda text, *args: messages.append(text % args))
    return messages


@pytest.fixture
def cfg():
    return OmegaConf.create(
        {
            "data": dict.fromkeys(DATA_KEYS),
            "model": {"num_classes": 80},
            "dataloader": {
                "train": {"dataset": {"names": "coco_2017_train"}},
                "test": {"dataset": {"names": "coco_2017_val"}},
                "evaluator": {"dataset_name": "${..test.dataset.names}"},
            },
        }
    )
