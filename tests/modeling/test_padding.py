"""How images are padded to what a backbone asks for, and that padding masks tell only of images."""

import pytest
import torch
from detectron2.modeling import FPN, MViT, SimpleFeaturePyramid, SwinTransformer, ViT
from detectron2.modeling.backbone import BasicStem, ResNet
from small_detectors import assert_every_gradient

from lite_detr.modeling.backbone.padding import batch_images, divisibility
from lite_detr.modeling.detector import padding_mask
from lite_detr.modeling.scales import resize_mask

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
