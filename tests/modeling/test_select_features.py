"""Which maps of a backbone the neck takes."""

import pytest
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
