"""Inputs of detectors: their validation, padding, and images of several sizes in one batch."""

import numpy as np
import pytest
import torch
from detectron2.modeling import FPN, MViT, SimpleFeaturePyramid, SwinTransformer, ViT
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.structures import Boxes, ImageList, RotatedBoxes
from small_detectors import (
    CONFIGS,
    assert_every_gradient,
    encode_maps,
    small_detector,
    small_inputs,
)

from lite_detr.errors import DatasetError
from lite_detr.modeling.detector import padding_mask
from lite_detr.modeling.inputs import batch_images, divisibility
from lite_detr.modeling.scales import resize_mask


@pytest.mark.parametrize(
    "inputs, error, problem",
    [
        ([], ValueError, "at least one image, got an empty list"),
        (torch.zeros(1, 3, 64, 64), TypeError, r"list with a dict for each image.*got Tensor"),
        ({"image": torch.zeros(3, 64, 64)}, TypeError, "got dict"),
        ([torch.zeros(3, 64, 64)], TypeError, "got list of Tensor"),
        ([{"file_name": "a.jpg", "height": 64}], ValueError, "a.jpg has no `image`, only file_n.*"),
        ([{"image": np.zeros((3, 64, 64))}], TypeError, "got ndarray: torch.as_tensor"),
        ([{"image": torch.zeros(64, 48, 3)}], ValueError, r"\[3, H, W\], .* got \(64, 48, 3\)"),
        ([{"image": torch.zeros(1, 3, 64, 64)}], ValueError, r"one image.*\(1, 3, 64, 64\)"),
        ([{"image": torch.zeros(1, 64, 64)}], ValueError, r"got \(1, 64, 64\)"),
        ([{"image": torch.zeros(3, 0, 64)}], ValueError, r"one pixel, got \(3, 0, 64\)"),
    ],
)
def test_inputs_that_are_no_images_are_named_with_what_is_accepted(
    make_detector, make_input, inputs, error, problem
):
    model = make_detector()
    if isinstance(inputs, list) and inputs and isinstance(inputs[0], dict):
        # A whole one before it does not hide it.
        inputs = [make_input(64, 64), *inputs]
    for run in (model, model.forward_queries):
        with pytest.raises(error, match=problem):
            run(inputs)


@pytest.mark.parametrize(
    "field, value, error, problem",
    [
        ("gt_classes", torch.tensor([1], dtype=torch.uint8), TypeError, "int64, got torch.uint8"),
        (
            "gt_boxes",
            Boxes(torch.tensor([[1.0, 2.0, float("nan"), 9.0]])),
            ValueError,
            r"b.jpg has boxes that are NaN or infinite, such as \[1.0, 2.0, nan, 9.0\]",
        ),
        (
            "gt_boxes",
            Boxes(torch.tensor([[1.0, 2.0, 8.0, float("inf")]])),
            ValueError,
            "boxes that are NaN or infinite",
        ),
        (
            "gt_boxes",
            RotatedBoxes(torch.tensor([[9.0, 9.0, 8.0, 4.0, 30.0]])),
            DatasetError,
            "b.jpg has rotated boxes, and the detectors find upright ones",
        ),
    ],
)
def test_ground_truth_that_cannot_be_learned_is_named(
    make_detector, make_input, field, value, error, problem
):
    inputs = make_input(64, 64, 1) | {"file_name": "b.jpg"}
    inputs["instances"].set(field, value)
    with pytest.raises(error, match=problem):
        make_detector()([inputs])


def test_ground_truth_without_boxes_is_named(make_detector, make_input):
    inputs = make_input(64, 64, 1) | {"file_name": "b.jpg"}
    inputs["instances"].remove("gt_boxes")
    with pytest.raises(DatasetError, match="of b.jpg have no gt_boxes, only gt_classes"):
        make_detector()([inputs])


ODD = (75, 101)
# As Detectron2's images are: alone, and of several sizes.
BATCHES = pytest.mark.parametrize("sizes", [[ODD], [(64, 96)], [ODD, (33, 130), (64, 40)]], ids=str)


def resnet():
    return ResNet(
        BasicStem(3, 64, norm="BN"),
        ResNet.make_default_stages(depth=18, norm="BN"),
        out_features=["res3", "res4", "res5"],
    )


def fpn(square_pad=0):
    return FPN(resnet(), ["res3", "res4", "res5"], out_channels=16, square_pad=square_pad)


def feature_pyramid(square_pad=0):
    net = ViT(img_size=64, embed_dim=24, depth=2, num_heads=2, window_size=3, use_rel_pos=True,
              window_block_indexes=[0])  # fmt: skip
    return SimpleFeaturePyramid(net, "last_feat", 16, (2.0, 1.0, 0.5), square_pad=square_pad)


def mvit():
    return MViT(embed_dim=8, depth=5, last_block_indexes=(0, 1, 2, 4), img_size=64,
                out_features=("scale3", "scale4", "scale5"))  # fmt: skip


def swin():
    pytest.importorskip("timm")
    return SwinTransformer(embed_dim=12, depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4),
                           out_indices=(1, 2, 3))  # fmt: skip


BACKBONES = {
    "resnet": (resnet, 0),
    "fpn": (fpn, 32),
    "feature_pyramid": (feature_pyramid, 32),
    "mvit": (mvit, 0),
    "swin": (swin, 0),
}
EACH = pytest.mark.parametrize("name", BACKBONES)


def build(name):
    if name in ("feature_pyramid", "mvit"):
        pytest.importorskip("timm")
    return BACKBONES[name][0]()


@EACH
def test_divisibility_is_what_the_backbone_means(name):
    assert divisibility(build(name)) == BACKBONES[name][1]


@EACH
@BATCHES
def test_images_are_padded_to_what_the_backbone_takes(name, sizes):
    backbone = build(name).eval()
    multiple = max(divisibility(backbone), 1)
    images = [torch.randn(3, *size) for size in sizes]
    batch = batch_images(images, backbone)
    expected = [-(-max(lengths) // multiple) * multiple for lengths in zip(*sizes)]
    assert list(batch.tensor.shape) == [len(sizes), 3, *expected]
    assert batch.image_sizes == sizes
    for image, padded, (height, width) in zip(images, batch.tensor, sizes):
        assert torch.equal(padded[:, :height, :width], image)
        assert not padded[:, height:].any()
        assert not padded[:, :, width:].any()
    for name, feature in backbone(batch.tensor).items():
        stride = backbone.output_shape()[name].stride
        assert [-(-length // stride) for length in expected] == list(feature.shape[2:])


@EACH
@BATCHES
def test_a_detector_masks_what_is_not_of_an_image(make_detector, make_input, name, sizes):
    """Cell i of n begins at pixel i * H / n: it is the image's if the image has that pixel."""
    model = make_detector(backbone=build(name)).eval()
    inputs = [make_input(*size) for size in sizes]
    images = model.preprocess_images(inputs)
    _, scales = model.encode(images)
    full = images.tensor.shape[2:]
    masks = []
    for level, shape in enumerate(scales.shapes):
        cells = [torch.arange(n) * length // n for n, length in zip(map(int, shape), full)]
        outside = torch.stack([(cells[0] >= h)[:, None] | (cells[1] >= w)[None] for h, w in sizes])
        masks.append(outside.flatten(1))
        counted = [[(c < n).sum().item() / len(c) for c, n in zip(cells, size)] for size in sizes]
        expected = torch.tensor([[width, height] for height, width in counted])
        torch.testing.assert_close(scales.valid_ratios[:, level], expected)
    masks = torch.cat(masks, dim=1)
    if scales.padding_mask is None:
        assert not masks.any()
    else:
        assert torch.equal(scales.padding_mask, masks)


@EACH
def test_an_image_of_odd_size_trains_and_predicts(make_detector, make_input, name):
    model = make_detector(backbone=build(name))
    losses = model([make_input(*ODD, objects=2), make_input(40, 64, objects=1)])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert_every_gradient(model)
    instances = model.eval()([make_input(*ODD)])[0]["instances"]
    assert instances.image_size == ODD
    assert instances.pred_boxes.tensor.isfinite().all()


def test_a_divisibility_changes_no_mask_of_the_image_itself(make_detector, make_input):
    """Beside a backbone without one there are more cells, and those of the image are the same."""
    torch.manual_seed(0)
    any_size = make_detector(backbone=resnet()).eval()
    multiples = make_detector(backbone=fpn()).eval()
    inputs = [make_input(*ODD)]
    own, padded = (
        [
            ~resize_mask(padding_mask(images)[0], tuple(feature.shape[-2:]))
            for feature in model.neck(model.backbone(images.tensor))[:3]
        ]
        for model in (any_size, multiples)
        for images in [model.preprocess_images(inputs)]
    )
    for small, large in zip(own, padded):
        assert small.all()
        assert large.sum() == small.sum()
        assert large[:, : small.shape[1], : small.shape[2]].all()


@pytest.mark.parametrize("make", [fpn, feature_pyramid])
def test_a_square_holds_every_image(make):
    pytest.importorskip("timm")
    backbone = make(square_pad=128)
    batch = batch_images([torch.ones(3, *ODD), torch.ones(3, 128, 20)], backbone)
    assert batch.tensor.shape == (2, 3, 128, 128)
    assert batch.image_sizes == [ODD, (128, 20)]


def test_an_image_larger_than_the_square_is_refused():
    with pytest.raises(ValueError, match="129x101.*square of 128.*max_size=128.*square_pad"):
        batch_images([torch.ones(3, *ODD), torch.ones(3, 129, 20)], fpn(square_pad=128))


SIZES = [(64, 128), (128, 192), (90, 61)]
OUTPUT_SIZES = [{"height": 100, "width": 200}, {}, {"height": 33, "width": 22}]


def detections(model, maps, images, output_sizes):
    predictions = model.predict(*encode_maps(model, maps, images))
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
