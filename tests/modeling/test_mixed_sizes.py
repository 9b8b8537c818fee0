"""Images of several sizes in one batch.

``test_detector.py`` has for Deformable DETR what is here for H-DETR. DINO is left out there: as in
its reference, the decoder encodes the positions of queries in the padded frame.
"""

import pytest
import torch
from detectron2.structures import ImageList
from small_detectors import CONFIGS, small_detector, small_inputs

SIZES = [(64, 128), (128, 192), (90, 61)]
OUTPUT_SIZES = [{"height": 100, "width": 200}, {}, {"height": 33, "width": 22}]


def detections(model, maps, images, output_sizes):
    predictions = model.predict(*model.encode_maps(maps, images))
    results = model.postprocess(predictions, output_sizes, images.image_sizes)
    return [result["instances"] for result in results]


def assert_close(found, expected):
    assert found.image_size == expected.image_size and len(found) == len(expected) > 20
    assert torch.equal(found.pred_classes, expected.pred_classes)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    boxes = (instances.pred_boxes.tensor for instances in (found, expected))
    torch.testing.assert_close(*boxes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_an_image_gets_the_same_whatever_is_beside_it(name):
    """In the whole detector, if it is padded to the same size."""
    model = small_detector(name).eval()
    inputs = [
        {"image": small_inputs(0, height=height, width=width)[0]["image"], **output_size}
        for (height, width), output_size in zip(SIZES, OUTPUT_SIZES)
    ]
    batch = model.preprocess_images(inputs).tensor
    found = [output["instances"] for output in model(inputs)]
    assert [instances.image_size for instances in found] == [(100, 200), (128, 192), (33, 22)]
    for index, size in enumerate(SIZES):
        alone = ImageList(batch[index : index + 1], [size])
        maps = model.neck(model.backbone(alone.tensor))
        (expected,) = detections(model, maps, alone, [OUTPUT_SIZES[index]])
        assert_close(found[index], expected)
    # The largest, which nothing is added to.
    assert_close(found[1], model([inputs[1]])[0]["instances"])


@torch.no_grad()
def test_padding_changes_nothing_in_h_detr():
    """From the neck's maps on: convolutions and group norms before it see the padding."""
    model = small_detector("h_detr").eval()
    shapes = [
        [(-(-height // s), -(-width // s)) for s in (8, 16, 32, 64)] for height, width in SIZES
    ]
    maps = [[torch.randn(1, 64, *shape).double() for shape in levels] for levels in shapes]
    batch = [10 * torch.randn(len(SIZES), 64, *shape).double() for shape in shapes[1]]
    for index, image_maps in enumerate(maps):
        for level, own in zip(batch, image_maps):
            level[index, :, : own.shape[2], : own.shape[3]] = own[0]

    found = detections(model, batch, ImageList(torch.empty(3, 3, 128, 192), SIZES), OUTPUT_SIZES)
    for index, size in enumerate(SIZES):
        alone = ImageList(torch.empty(1, 3, *size), [size])
        (expected,) = detections(model, maps[index], alone, [OUTPUT_SIZES[index]])
        assert_close(found[index], expected)
