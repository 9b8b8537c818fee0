"""The detector as a function of tensors, against the detector itself."""

import pytest
import torch
from detectron2.structures import ImageList
from small_detectors import CONFIGS, small_detector

from lite_detr.export import ExportableDetector, export_torchscript
from lite_detr.modeling.detector import padding_mask
from lite_detr.modeling.scales import mask_from_sizes, resize_mask


def make_batch(sizes, height, width):
    """Images of the sizes with noise around them, and the images alone."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(sizes), 3, height, width), generator=generator).float()
    alone = [{"image": image[:, :h, :w]} for image, (h, w) in zip(images, sizes)]
    return images, torch.tensor(sizes), alone


@pytest.fixture(params=CONFIGS)
def detector(request):
    return small_detector(request.param).float().eval()


@torch.no_grad()
def test_gives_what_the_detector_gives(detector):
    sizes = [(64, 96), (50, 90), (61, 33)]
    images, image_sizes, alone = make_batch(sizes, 64, 96)
    batch = zip(*ExportableDetector(detector)(images, image_sizes))
    outputs = detector(alone)
    assert len(outputs) == 3
    for (boxes, scores, classes), output, (height, width) in zip(batch, outputs, sizes):
        assert boxes.shape == (50, 4) and scores.shape == classes.shape == (50,)
        assert boxes.min() >= 0 and (boxes <= torch.tensor([width, height] * 2)).all()
        # The detector leaves out empty boxes.
        kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        found = output["instances"]
        torch.testing.assert_close(boxes[kept], found.pred_boxes.tensor, atol=1e-4, rtol=0)
        torch.testing.assert_close(scores[kept], found.scores, atol=1e-6, rtol=0)
        assert torch.equal(classes[kept], found.pred_classes)


@torch.no_grad()
@pytest.mark.parametrize(
    "constraints, padded", [({"size_divisibility": 32}, (96, 128)), ({"square_size": 160}, None)]
)
def test_pads_as_the_backbone_asks(monkeypatch, constraints, padded):
    detector = small_detector("h_detr").float().eval()
    monkeypatch.setattr(type(detector.backbone), "padding_constraints", constraints)
    seen = []
    detector.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images, image_sizes, alone = make_batch([(70, 101), (70, 101)], 70, 101)
    found = ExportableDetector(detector)(images, image_sizes)
    expected = detector(alone)
    assert seen[0].shape[2:] == (padded or (160, 160))
    assert torch.equal(*seen)
    for scores, output in zip(found[1], expected):
        torch.testing.assert_close(scores[: len(output["instances"])], output["instances"].scores)


def test_mask_of_a_map_is_that_of_the_image_resized():
    generator = torch.Generator().manual_seed(0)
    for index in range(60):
        height, width = torch.randint(33, 1400, (2,), generator=generator).tolist()
        least = torch.randint(1, 33, (2,), generator=generator).tolist()
        sizes = [(height, least[1]), (least[0], width), (height - least[0], width - least[1])]
        mask, _ = padding_mask(image_list(sizes, height, width))
        for stride in (8, 16, 32, 64):
            up = index % 2 * (stride - 1)
            shape = max(1, (height + up) // stride), max(1, (width + up) // stride)
            found = mask_from_sizes(torch.tensor(sizes), (height, width), shape)
            assert torch.equal(found, resize_mask(mask, shape)), (height, width, shape)


def image_list(sizes, height, width):
    return ImageList(torch.empty(len(sizes), 1, height, width), sizes)


def test_only_float32_is_exported():
    detector = small_detector("dino").bfloat16()
    for export in (ExportableDetector, lambda detector: export_torchscript(detector, "a.ts")):
        with pytest.raises(TypeError, match="in torch.float32, got weights in torch.bfloat16"):
            export(detector)
