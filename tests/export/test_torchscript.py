"""TorchScript, as Detectron2's exporter makes it."""

import pytest
import torch
from small_detectors import CONFIGS, small_detector

from lite_detr.export import check, export_torchscript

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("name", CONFIGS)
def test_traced_once_it_takes_images_of_any_size(name, tmp_path):
    detector = small_detector(name).float()
    path = tmp_path / "detector.ts"
    export_torchscript(detector, path)
    run, expected = check.run_torchscript(path), check.run_detector_one_by_one(detector)
    batches = list(check.sample_batches(detector))
    assert len({images.shape[2:] for images, _ in batches}) == 3
    assert max(check.check_batches(run, expected, batches)) < 1e-6


def test_padding_is_masked_though_the_traced_image_has_none(tmp_path, monkeypatch):
    detector = small_detector("deformable_detr").float()
    constraints = {"size_divisibility": 32}
    monkeypatch.setattr(type(detector.backbone), "padding_constraints", constraints)
    path = tmp_path / "detector.ts"
    export_torchscript(detector, path)
    image = torch.rand(1, 3, 70, 101) * 255
    batch = [(image, torch.tensor([[70, 101]]))]
    run, expected = check.run_torchscript(path), check.run_detector_one_by_one(detector)
    assert max(check.check_batches(run, expected, batch)) < 1e-6
