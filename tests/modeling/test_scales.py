import dataclasses
import math

import pytest
import torch

from lite_detr.modeling import SinePositionEncoding
from lite_detr.modeling.scales import resize_mask

# Two scales; the second image covers 1 of 2 rows and 3 of 4 columns of the first one, and one of
# the two cells of the second one.
SHAPES = ((2, 4), (1, 2))
VALID = (SHAPES, ((1, 3), (1, 1)))


@pytest.fixture
def scales(make_scales):
    return make_scales(SHAPES, VALID, dtype=torch.float32)


def test_token_order(scales):
    assert scales.shapes == SHAPES
    assert (scales.num_levels, scales.num_tokens) == (2, 10)
    assert [scales.start(level) for level in range(3)] == [0, 8, 10]
    assert scales.spatial_shapes.tolist() == [[2, 4], [1, 2]]
    assert scales.level_start_index.tolist() == [0, 8]
    assert scales.spatial_shapes.dtype == scales.level_start_index.dtype == torch.int64


def test_padding_mask(scales):
    rows = [[0, 0, 0, 1], [1, 1, 1, 1], [0, 1]]
    assert scales.padding_mask.dtype == torch.bool
    assert scales.padding_mask.int().tolist() == [[0] * 10, sum(rows, [])]


def test_valid_ratios_are_x_then_y(scales):
    expected = torch.tensor([[[1, 1], [1, 1]], [[0.75, 0.5], [0.5, 1]]])
    torch.testing.assert_close(scales.valid_ratios, expected)


def test_centers_are_relative_to_the_image(scales):
    full = [(x, y) for y in (0.25, 0.75) for x in (0.125, 0.375, 0.625, 0.875)]
    full += [(0.25, 0.5), (0.75, 0.5)]
    # One row and three columns, then one cell, make up the image; what follows lies beyond 1.
    padded = [(x / 6, y) for y in (0.5, 1.5) for x in (1, 3, 5, 7)] + [(0.5, 0.5), (1.5, 0.5)]
    torch.testing.assert_close(scales.centers, torch.tensor([full, padded]))


def test_reference_points_are_in_the_padded_frame_of_each_scale(scales):
    expected = torch.empty(2, 10, 2, 2)
    ratios = [[(1, 1), (1, 1)], [(0.75, 0.5), (0.5, 1)]]
    for image in range(2):
        for token in range(10):
            x, y = scales.centers[image, token].tolist()
            for level, (ratio_x, ratio_y) in enumerate(ratios[image]):
                expected[image, token, level] = torch.tensor([x * ratio_x, y * ratio_y])
    torch.testing.assert_close(scales.reference_points, expected)
    # On its own scale a token looks at the centre of its own cell.
    cell = scales.reference_points[1, 2, 0] * torch.tensor([4.0, 2.0])
    torch.testing.assert_close(cell, torch.tensor([2.5, 0.5]))


def test_no_padding_mask_where_nothing_is_padded(make_scales):
    scales = make_scales(SHAPES, batch=2)
    assert scales.padding_mask is None
    assert torch.equal(scales.valid_ratios, torch.ones(2, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(make_scales, dtype):
    scales = make_scales(SHAPES, VALID, dtype=dtype)
    names = ("valid_ratios", "centers", "reference_points")
    assert {getattr(scales, name).dtype for name in names} == {dtype}


def test_immutable(scales):
    for field in dataclasses.fields(scales):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(scales, field.name, None)


def test_resize_mask_takes_the_nearest_pixel_up_and_left():
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, 3:] = True
    mask[0, :, 4:] = True
    resized = resize_mask(mask, (2, 3))
    assert resized.dtype == torch.bool
    assert resized[0].int().tolist() == [[0, 0, 1], [0, 0, 1]]
    assert torch.equal(resize_mask(mask, (4, 6)), mask)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_resize_mask_leaves_every_image_a_cell(size):
    mask = torch.ones(1, 100, 64, dtype=torch.bool)
    mask[0, :1, :size] = False
    assert not resize_mask(mask, (2, 1))[0, 0, 0]


def encode_by_loop(height, width, valid_height, valid_width, channels, temperature):
    """Of the cells that are no padding: {(row, column): [y channels, then x channels]}."""
    encoding = {}
    for row in range(height):
        for column in range(width):
            if row >= valid_height or column >= valid_width:
                continue
            values = []
            for index, valid in ((row, valid_height), (column, valid_width)):
                position = (index + 0.5) / valid * 2 * math.pi
                for channel in range(channels // 2):
                    exponent = 2 * (channel // 2) / (channels // 2)
                    wave = math.cos if channel % 2 else math.sin
                    values.append(wave(position / temperature**exponent))
            encoding[row, column] = values
    return encoding


@pytest.mark.parametrize("temperature", [10000.0, 20.0])
def test_sine_position_encoding_equals_loop(temperature):
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    mask[0] = False
    mask[1, :2, :3] = False
    encoding = SinePositionEncoding(8, temperature)(mask)
    assert encoding.shape == (2, 20, 8)
    assert encoding.dtype == torch.float32
    for image, valid in enumerate(((4, 5), (2, 3))):
        expected = encode_by_loop(4, 5, *valid, 8, temperature)
        assert len(expected) == valid[0] * valid[1]
        for (row, column), values in expected.items():
            # The references add 1e-6 to the valid size.
            torch.testing.assert_close(
                encoding[image, row * 5 + column], torch.tensor(values), rtol=0, atol=1e-5
            )


def test_sine_position_encoding_does_not_see_padding():
    mask = torch.ones(1, 7, 9, dtype=torch.bool)
    mask[0, :3, :4] = False
    encode = SinePositionEncoding(16)
    padded = encode(mask).view(7, 9, 16)[:3, :4]
    alone = encode(torch.zeros(1, 3, 4, dtype=torch.bool)).view(3, 4, 16)
    assert torch.equal(padded, alone)


def test_sine_position_encoding_offset_moves_by_cells():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    one_cell_on = SinePositionEncoding(8, offset=0.5)(mask).view(4, 4, 8)[:3, :3]
    centers = SinePositionEncoding(8, offset=-0.5)(mask).view(4, 4, 8)[1:, 1:]
    torch.testing.assert_close(one_cell_on, centers)


def test_sine_position_encoding_needs_a_multiple_of_four():
    with pytest.raises(ValueError, match="multiple of 4.*got 10"):
        SinePositionEncoding(10)
