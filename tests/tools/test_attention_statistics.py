"""The attention of a run's checkpoints, on a tiny detector whose queries start at zero."""

import json

import attention_statistics
import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from PIL import Image
from programs import TINY

from lite_detr import model_zoo


@pytest.fixture
def dataset(tmp_path):
    rng = np.random.default_rng(0)
    images = [{"id": i, "file_name": f"{i}.png", "height": 64, "width": 96} for i in (1, 2)]
    boxes = [
        {
            "id": i,
            "image_id": i,
            "category_id": 1,
            "bbox": [9, 9, 40, 30],
            "area": 1200,
            "iscrowd": 0,
        }
        for i in (1, 2)
    ]
    for image in images:
        pixels = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / image["file_name"])
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cell"}]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    return [
        option
        for split in ("train", "val")
        for option in (
            f"data.{split}_json={tmp_path}/boxes.json",
            f"data.{split}_images={tmp_path}",
        )
    ]


def test_entropy_falls_once_weights_differ(dataset, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    cfg = model_zoo.get_config(str(TINY))
    LazyConfig.save(cfg, str(run / "config.yaml"))
    cfg.model.num_classes = 1
    model = instantiate(cfg.model)
    for name, parameter in model.named_parameters():
        if name.endswith("query_proj.weight"):
            torch.nn.init.normal_(parameter, std=3.0)
    torch.save({"model": model.state_dict()}, run / "model_0000049.pth")
    picture, figures = tmp_path / "picture.png", tmp_path / "figures.json"
    attention_statistics.main(
        ["--runs", str(run), "--names", "key-aware", "--batches", "1", *dataset]
        + ["--output", str(picture), "--json", str(figures)]
    )
    start, later = json.loads(figures.read_text())["key-aware"]
    assert (start["iteration"], later["iteration"]) == (0, 50)
    assert start["entropies"] == pytest.approx([1.0] * len(start["entropies"]), abs=1e-5)
    assert max(later["entropies"]) < 0.9
    assert min(start["gradients"]) > 0
    assert picture.stat().st_size > 10000


def test_run_without_checkpoints_is_refused(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    LazyConfig.save(model_zoo.get_config(str(TINY)), str(run / "config.yaml"))
    with pytest.raises(SystemExit):
        attention_statistics.main(["--runs", str(run), "--output", str(tmp_path / "a.png")])
    assert "has no model_NNNNNNN.pth" in capsys.readouterr().err
