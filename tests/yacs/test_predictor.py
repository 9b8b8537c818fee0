"""DefaultPredictor and DetectionCheckpointer with our detectors."""

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image
from programs import CONFIGS
from torch import nn

from lite_detr import model_zoo
from lite_detr.checkpoint import DetrCheckpointer, WeightsError
from lite_detr.inference.predictor import TrainedDetector

LITE_DINO = "dino/lite_dino_r50_h3l1_2p1x3_36ep"
LITE_H_DETR = "h_detr/lite_h_detr_r50_h3l1_2p1x3_36ep"


@pytest.fixture
def photo(tmp_path):
    """A file, and what OpenCV would read of it: ``[H, W, 3]``, blue first."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png", pixels[:, :, ::-1]


@pytest.fixture
def weights(tiny, tmp_path):
    """The weights of the tiny detector, drawn at random."""
    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save({"model": build_model(tiny).state_dict()}, path)
    return path


def assert_same(given, expected):
    assert given.image_size == expected.image_size
    assert torch.equal(given.pred_classes, expected.pred_classes)
    torch.testing.assert_close(given.scores, expected.scores, rtol=0, atol=1e-5)
    given, expected = given.pred_boxes.tensor, expected.pred_boxes.tensor
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("detector", ["deformable_detr", "dino", "h_detr"])
def test_a_prediction_is_that_of_the_demo(detector, tiny, photo, tmp_path):
    """A YAML config on one side, a lazy one of the same weights on the other."""
    if detector == "deformable_detr":
        cfg, lazy = tiny, model_zoo.get_config(str(CONFIGS / "tiny.py"))
        lazy.model.num_classes = 10
    else:
        name = LITE_DINO if detector == "dino" else LITE_H_DETR
        cfg, lazy = model_zoo.get_yaml_config(f"{name}.yaml"), model_zoo.get_config(f"{name}.py")
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
        lazy.model.backbone.stages.depth = 18
        del lazy.model.backbone.stages.stride_in_1x1
        cfg.INPUT.MIN_SIZE_TEST = 100
        lazy.dataloader.test.mapper.augmentations[0].short_edge_length = 100
    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save({"model": build_model(cfg).state_dict()}, path)
    cfg.MODEL.WEIGHTS = lazy.train.init_checkpoint = str(path)
    lazy.train.device = "cpu"

    file, pixels = photo
    drawn = TrainedDetector(lazy, threshold=0.0)
    expected = drawn.predict(drawn.read(file)[1])
    given = DefaultPredictor(cfg)(pixels)["instances"]
    assert given.image_size == (90, 130) and len(given) > 10
    assert_same(given, expected)


def test_the_threshold_and_the_number_of_detections_are_respected(tiny, weights, photo):
    tiny.MODEL.WEIGHTS = str(weights)
    everything = DefaultPredictor(tiny)(photo[1])["instances"]
    threshold = everything.scores[4].item()
    tiny.MODEL.DETR.SCORE_THRESH_TEST = threshold
    some = DefaultPredictor(tiny)(photo[1])["instances"]
    assert len(some) == (everything.scores > threshold).sum() < len(everything)
    tiny.TEST.DETECTIONS_PER_IMAGE = 3
    best = DefaultPredictor(tiny)(photo[1])["instances"]
    assert_same(best, everything[:3])


def test_images_are_taken_blue_first_whatever_the_model_wants(tiny, weights, photo):
    tiny.MODEL.WEIGHTS = str(weights)
    expected = DefaultPredictor(tiny)(photo[1])["instances"]
    tiny.INPUT.FORMAT = "BGR"
    swapped = DefaultPredictor(tiny)(photo[1][:, :, ::-1])["instances"]
    assert_same(swapped, expected)


def test_weights_that_are_missing_or_hold_no_detector_are_refused(tiny, tmp_path):
    tiny.MODEL.WEIGHTS = str(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="none.pth: there is no such file"):
        DefaultPredictor(tiny)
    state = {k: v for k, v in build_model(tiny).state_dict().items() if k.startswith("backbone.")}
    torch.save({"model": state}, tmp_path / "backbone.pth")
    tiny.MODEL.WEIGHTS = str(tmp_path / "backbone.pth")
    with pytest.raises(WeightsError, match="hold no detector"):
        DefaultPredictor(tiny)


def test_a_backbones_weights_start_a_training(tiny, tmp_path):
    """With an optimizer beside the model, as Detectron2's trainers give it to the checkpointer."""
    model = build_model(tiny)
    state = {k: v + 1 for k, v in model.state_dict().items() if k.startswith("backbone.")}
    torch.save({"model": state}, tmp_path / "backbone.pth")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    checkpointer = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer)
    checkpointer.resume_or_load(str(tmp_path / "backbone.pth"), resume=False)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_detectron2s_checkpointer_is_ours_for_our_detectors_alone(tiny):
    detector = build_model(tiny)
    wrapper = nn.DataParallel(detector)
    assert type(DetectionCheckpointer(detector)) is DetrCheckpointer
    assert type(DetectionCheckpointer(wrapper)) is DetrCheckpointer
    assert DetectionCheckpointer(wrapper).model is detector
    assert type(DetectionCheckpointer(nn.Linear(2, 2))) is DetectionCheckpointer

    class Own(DetectionCheckpointer):
        pass

    assert type(Own(detector)) is Own


def test_without_a_gpu_a_config_for_one_runs_on_the_cpu_with_a_warning(tiny, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny.MODEL.DEVICE = "cuda"
    tiny.freeze()
    assert build_model(tiny).device.type == "cpu"
    assert "MODEL.DEVICE is cuda, and PyTorch finds no GPU" in caplog.text
    assert tiny.MODEL.DEVICE == "cpu" and tiny.is_frozen()
