"""The feature maps that the neck selects and makes."""

import pytest
import torch
from detectron2.layers import ShapeSpec

from lite_detr.modeling.neck import MultiScaleNeck, select_features


def offer(*strides):
    """A backbone's shapes: the first map of stride 8 is c8, the second d8, and so on."""
    names = [f"{'cdef'[strides[:i].count(stride)]}{stride}" for i, stride in enumerate(strides)]
    return {n: ShapeSpec(channels=4 * s, stride=s) for n, s in zip(names, strides)}


@pytest.mark.parametrize(
    "strides, selected",
    [
        ((8, 16, 32), ["c8", "c16", "c32"]),
        ((64, 32, 4, 8, 2, 16), ["c8", "c16", "c32"]),
        ((4, 8, 16), ["c8", "c16"]),
        ((8,), ["c8"]),
        ((4, 4, 8, 16, 32, 64, 64), ["c8", "c16", "c32"]),
    ],
)
def test_maps_are_taken_as_far_as_the_backbone_goes(strides, selected):
    assert select_features(offer(*strides), None) == selected


def test_the_neck_makes_the_scales_that_the_backbone_lacks():
    neck = MultiScaleNeck(offer(4, 8, 16), None, embed_dim=32, num_levels=4)
    convolutions = [conv for conv, _ in [*neck.lateral_convs, *neck.extra_convs]]
    assert [conv.in_channels for conv in convolutions] == [32, 64, 64, 32]
    assert [conv.stride for conv in convolutions] == [(1, 1), (1, 1), (2, 2), (2, 2)]


@pytest.mark.parametrize(
    "strides, problem",
    [
        ((16, 16, 16, 16), "stride 8: 0 have it"),
        ((4, 16, 32), "stride 8: 0 have it"),
        ((4,), "stride 8: 0 have it"),
        ((), "stride 8: 0 have it"),
        ((8, 32), "stride 16: 0 have it"),
        ((8, 8, 16, 32), "stride 8: 2 have it"),
        ((8, 16, 16, 32), "stride 16: 2 have it"),
        ((8, 16, 32, 32), "stride 32: 2 have it"),
    ],
)
def test_a_backbone_that_cannot_serve_is_told_with_what_it_offers(strides, problem):
    shapes = offer(*strides)
    with pytest.raises(ValueError, match=f"{problem}; the backbone offers.*in_features") as error:
        select_features(shapes, None)
    for name, spec in shapes.items():
        assert f"{name} (stride {spec.stride})" in str(error.value)


def test_maps_that_are_named_need_no_stride_of_ours():
    assert select_features(offer(4, 16, 16, 64), ["c4", "d16"]) == ["c4", "d16"]


OFFER = {
    "p6": ShapeSpec(channels=40, stride=64),
    "c5": ShapeSpec(channels=32, stride=32),
    "c2": ShapeSpec(channels=4, stride=4),
    "c3": ShapeSpec(channels=8, stride=8),
    "c4": ShapeSpec(channels=16, stride=16),
}


def feature_maps(height=50, width=70):
    return {
        name: torch.randn(2, s.channels, -(-height // s.stride), -(-width // s.stride))
        for name, s in OFFER.items()
    }


@pytest.mark.parametrize(
    "in_features, num_levels, used, shapes",
    [
        (None, 3, ["c3", "c4", "c5"], [(7, 9), (4, 5), (2, 3)]),
        (None, 5, ["c3", "c4", "c5"], [(7, 9), (4, 5), (2, 3), (1, 2), (1, 1)]),
        (["c2", "c4"], 4, ["c2", "c4"], [(13, 18), (4, 5), (2, 3), (1, 2)]),
        (["c5", "p6"], 2, ["c5", "p6"], [(2, 3), (1, 2)]),
    ],
)
def test_neck(in_features, num_levels, used, shapes):
    """Maps chosen by stride unless named; further ones are halved, rounding up."""
    neck = MultiScaleNeck(OFFER, in_features, embed_dim=64, num_levels=num_levels)
    assert neck.in_features == used
    channels = [OFFER[name].channels for name in used]
    maps = neck(feature_maps())
    assert [tuple(m.shape) for m in maps] == [(2, 64, *shape) for shape in shapes]
    extra = [channels[-1]] + [64] * (num_levels - len(used))
    convs = [conv for conv, _ in [*neck.lateral_convs, *neck.extra_convs]]
    assert [conv.in_channels for conv in convs] == channels + extra[: num_levels - len(used)]
    kernels = [(1, 1)] * len(used) + [(3, 3)] * (num_levels - len(used))
    assert [conv.kernel_size for conv in convs] == kernels
    assert not any(conv.bias.any() for conv in convs)


def test_neck_by_hand():
    """A projection, and a first added scale from the backbone's map, not from its projection."""
    neck = MultiScaleNeck(OFFER, ["c4"], embed_dim=32, num_levels=3)
    features = feature_maps(height=64, width=96)
    maps = neck(features)
    lateral, extra = neck.lateral_convs[0][0], neck.extra_convs
    x = torch.einsum("bihw,oi->bohw", features["c4"], lateral.weight[:, :, 0, 0])
    mean, std = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True).sqrt()
    torch.testing.assert_close(maps[0], (x - mean) / std, rtol=1e-3, atol=1e-3)
    assert torch.equal(maps[1], extra[0](features["c4"]))
    assert torch.equal(maps[2], extra[1](maps[1]))


TWICE = OFFER | {"d4": ShapeSpec(channels=16, stride=16)}
WITHOUT = {name: spec for name, spec in OFFER.items() if name != "c4"}


@pytest.mark.parametrize(
    "offer, in_features, num_levels, problem",
    [
        (OFFER, ["c3", "c7"], 4, r"no feature \['c7'\]"),
        (OFFER, ["c4", "c3"], 4, r"fine to coarse.*\['c4', 'c3'\].*\[16, 8\]"),
        (TWICE, ["c4", "d4"], 4, r"one map per stride.*\['c4', 'd4'\].*\[16, 16\]"),
        (WITHOUT, None, 4, "stride 16: 0 have it.*in_features"),
        (TWICE, None, 4, "stride 16: 2 have it.*in_features"),
    ],
)
def test_neck_says_what_the_backbone_offers(offer, in_features, num_levels, problem):
    with pytest.raises(ValueError, match=problem) as error:
        MultiScaleNeck(offer, in_features, embed_dim=32, num_levels=num_levels)
    for name, spec in offer.items():
        assert f"{name} (stride {spec.stride})" in str(error.value)


@pytest.mark.parametrize("in_features, num_levels", [(None, 2), (["c2", "c3", "c4", "c5"], 3)])
def test_neck_needs_as_many_levels_as_maps(in_features, num_levels):
    maps = len(in_features or ("c3", "c4", "c5"))
    with pytest.raises(ValueError, match=f"num_levels is {num_levels}, but there are {maps} .*c4"):
        MultiScaleNeck(OFFER, in_features, embed_dim=32, num_levels=num_levels)
