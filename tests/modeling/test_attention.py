import inspect
import math

import pytest
import torch

from lite_detr.modeling import (
    DecoderLayer,
    EncoderLayer,
    FeedForward,
    KeyAwareDeformableAttention,
    MultiScaleDeformableAttention,
)

SHAPES = ((3, 4), (2, 2))
CHANNELS = 16
BOTH = pytest.mark.parametrize(
    "attention_class", [MultiScaleDeformableAttention, KeyAwareDeformableAttention]
)
VARIANTS = pytest.mark.parametrize(
    "make",
    [
        pytest.param(MultiScaleDeformableAttention, id="msda"),
        pytest.param(KeyAwareDeformableAttention, id="kda"),
        pytest.param(
            lambda *sizes: KeyAwareDeformableAttention(*sizes, key_proj=True), id="kda-key_proj"
        ),
    ],
)


def build(make, perturb, num_points=3):
    return perturb(make(CHANNELS, 2, 2, num_points).double(), std=0.3)


def random_inputs(scales, batch=1, queries=5, reference_dim=2):
    query = torch.randn(batch, queries, CHANNELS, dtype=torch.float64)
    reference = torch.rand(batch, queries, scales.num_levels, reference_dim, dtype=torch.float64)
    memory = torch.randn(batch, scales.num_tokens, CHANNELS, dtype=torch.float64)
    return query, reference, memory


@BOTH
def test_offsets_start_on_the_unit_square(attention_class):
    """8 heads look along the axes and diagonals, point p of each at p + 1 cells, on each scale."""
    attention = attention_class(32, num_heads=8, num_levels=3, num_points=4)
    offsets = attention.sampling_offsets(torch.randn(1, 1, 32)).view(8, 3, 4, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, (x, y) in enumerate(directions):
        for level in range(3):
            expected = torch.tensor([[x * step, y * step] for step in (1.0, 2.0, 3.0, 4.0)])
            torch.testing.assert_close(offsets[head, level], expected, rtol=0, atol=1e-6)
    assert not attention.sampling_offsets.weight.any()


@BOTH
def test_projections_start_at_xavier_and_zero_bias(attention_class):
    """But that of the query, which starts at zero."""
    attention = attention_class(32)
    bound = math.sqrt(6 / (32 + 32))
    for name, projection in attention.named_children():
        if name.endswith("_proj") and name != "query_proj":
            assert not projection.bias.any()
            assert 0.9 * bound < projection.weight.abs().max() <= bound


def test_queries_start_at_random_on_request():
    attention = KeyAwareDeformableAttention(32, random_queries=True)
    bound = math.sqrt(6 / (32 + 32))
    assert 0.9 * bound < attention.query_proj.weight.abs().max() <= bound
    assert not attention.query_proj.bias.any()


@BOTH
def test_weights_start_uniform(make_scales, attention_class):
    """Where each scale is constant, the result is the mean over scales, whatever the query."""
    scales = make_scales(((12, 12), (9, 9), (10, 11)))
    attention = attention_class(CHANNELS, 2, 3, 2).double()
    constants = torch.randn(3, CHANNELS, dtype=torch.float64)
    memory = torch.cat([c.expand(h * w, -1) for c, (h, w) in zip(constants, scales.shapes)])
    query, _, _ = random_inputs(scales)
    reference = torch.full((1, 5, 3, 2), 0.5, dtype=torch.float64)
    expected = attention.output_proj(attention.value_proj(constants.mean(0)))
    torch.testing.assert_close(
        attention(query, reference, memory[None], scales), expected.expand(1, 5, -1)
    )


@VARIANTS
def test_memory_on_padding_does_not_count(make, make_scales, perturb):
    scales = make_scales(SHAPES, (SHAPES, ((2, 2), (1, 1))))
    attention = build(make, perturb)
    query, reference, memory = random_inputs(scales, batch=2)
    output = attention(query, reference, memory, scales)
    garbage = torch.where(scales.padding_mask[..., None], 1e3 * torch.randn_like(memory), memory)
    assert torch.equal(attention(query, reference, garbage, scales), output)

    other = torch.where(scales.padding_mask[..., None], memory, torch.randn_like(memory))
    changed = attention(query, reference, other, scales) != output
    assert changed.any(-1).any(-1).all()


@VARIANTS
def test_padding_is_as_what_lies_outside_the_map(make, make_scales, perturb):
    valid = ((2, 2), (1, 1))
    padded = make_scales(SHAPES, (valid,))
    cropped = make_scales(valid)
    attention = build(make, perturb)
    query, reference, memory = random_inputs(padded)
    maps = memory[0].split([12, 4])
    crops = [
        level_map.view(*shape, -1)[:height, :width].flatten(0, 1)
        for level_map, shape, (height, width) in zip(maps, SHAPES, valid)
    ]
    torch.testing.assert_close(
        attention(query, reference * padded.valid_ratios[:, None], memory, padded),
        attention(query, reference, torch.cat(crops)[None], cropped),
    )


def fixed_offsets(num_points):
    """An attention of 2 heads and scales whose offsets are known, whatever the query."""
    attention = MultiScaleDeformableAttention(CHANNELS, 2, 2, num_points).double()
    offsets = torch.randn(2, 2, num_points, 2, dtype=torch.float64)
    with torch.no_grad():
        attention.sampling_offsets.bias.copy_(offsets.flatten())
    return attention, offsets.tolist()


@pytest.mark.parametrize("reference_dim", [2, 4])
def test_sampling_locations_by_hand(make_scales, reference_dim):
    """Offsets count cells around points, and half extents over the points' number around boxes."""
    scales = make_scales(SHAPES)
    attention, offsets = fixed_offsets(num_points=3)
    query, reference, _ = random_inputs(scales, queries=2, reference_dim=reference_dim)
    locations = attention.sampling_locations(query, reference, scales)
    assert locations.shape == (1, 2, 2, 2, 3, 2)
    for q in range(2):
        for head in range(2):
            for level, (rows, columns) in enumerate(SHAPES):
                x, y, *size = reference[0, q, level].tolist()
                for point in range(3):
                    dx, dy = offsets[head][level][point]
                    if size:
                        expected = [x + dx / 3 * size[0] / 2, y + dy / 3 * size[1] / 2]
                    else:
                        expected = [x + dx / columns, y + dy / rows]
                    assert locations[0, q, head, level, point].tolist() == pytest.approx(
                        expected, abs=1e-12
                    )


@VARIANTS
@pytest.mark.parametrize("last_dim", [1, 3, 5])
def test_reference_points_are_points_or_boxes(make, make_scales, last_dim):
    scales = make_scales(SHAPES)
    inputs = random_inputs(scales, reference_dim=last_dim)
    with pytest.raises(ValueError, match=rf"reference_points.*1, 5, 2, {last_dim}"):
        make(CHANNELS, 2, 2, 3).double()(*inputs, scales)


@BOTH
def test_heads_divide_channels(attention_class):
    with pytest.raises(ValueError, match="multiple of num_heads, got 30 and 8"):
        attention_class(30, num_heads=8)


def test_both_attentions_have_one_interface():
    first, second = MultiScaleDeformableAttention, KeyAwareDeformableAttention
    assert inspect.signature(first.forward) == inspect.signature(second.forward)
    own = inspect.signature(first).parameters
    other = inspect.signature(second).parameters
    assert {name: other[name] for name in own} == own
    assert list(other)[: len(own)] == list(own)


@VARIANTS
@pytest.mark.parametrize("reference_dim", [2, 4])
def test_layers_take_either_attention(make, make_scales, reference_dim):
    scales = make_scales(SHAPES)
    query, reference, memory = random_inputs(scales, reference_dim=reference_dim)
    for layer_class in (EncoderLayer, DecoderLayer):
        layer = layer_class(make(CHANNELS, 2, 2, 3), FeedForward(CHANNELS, 8)).double().eval()
        output = layer(query, torch.zeros_like(query), reference, memory, scales)
        assert output.shape == query.shape
        other = layer(query, torch.zeros_like(query), reference, -memory, scales)
        assert not torch.allclose(output, other)


def test_attentions_share_the_names_of_what_they_share():
    """So that learning rate factors and weights find both."""
    names = [
        {name for name, _ in attention_class(CHANNELS, 2).named_parameters()}
        for attention_class in (MultiScaleDeformableAttention, KeyAwareDeformableAttention)
    ]
    shared = {"sampling_offsets", "value_proj", "output_proj"}
    expected = {f"{module}.{kind}" for module in shared for kind in ("weight", "bias")}
    assert names[0] & names[1] == expected


def linear(projection, vector):
    return projection.weight @ vector + projection.bias


@pytest.mark.parametrize("key_proj", [False, True])
def test_key_aware_attention_by_hand(make_scales, perturb, key_proj):
    """Three scales of one cell, looked at in its centre: attention over three tokens."""
    scales = make_scales(((1, 1),) * 3)
    attention = KeyAwareDeformableAttention(CHANNELS, 2, 3, 1, key_proj=key_proj).double()
    perturb(attention)
    with torch.no_grad():
        attention.sampling_offsets.weight.zero_()
        attention.sampling_offsets.bias.zero_()
    query = torch.randn(CHANNELS, dtype=torch.float64)
    memory = torch.randn(3, CHANNELS, dtype=torch.float64)
    reference = torch.full((1, 1, 3, 2), 0.5, dtype=torch.float64)

    projected = linear(attention.query_proj, query)
    values = [linear(attention.value_proj, token) for token in memory]
    keys = [linear(attention.key_proj, token) for token in memory] if key_proj else values
    heads = []
    for part in (slice(0, 8), slice(8, 16)):
        exponentials = [(projected[part].dot(key[part]) / math.sqrt(8)).exp() for key in keys]
        weighted = [e * value[part] for e, value in zip(exponentials, values)]
        heads.append(sum(weighted) / sum(exponentials))
    expected = linear(attention.output_proj, torch.cat(heads))
    output = attention(query.view(1, 1, -1), reference, memory[None], scales)
    torch.testing.assert_close(output.flatten(), expected)


def test_values_as_keys_need_no_projection(make_scales, perturb):
    """With equal projections a key_proj changes nothing, and with others it does."""
    scales = make_scales(SHAPES)
    without = build(KeyAwareDeformableAttention, perturb)
    assert without.key_proj is None
    with_proj = KeyAwareDeformableAttention(CHANNELS, 2, 2, 3, key_proj=True).double()
    missing = with_proj.load_state_dict(without.state_dict(), strict=False).missing_keys
    assert missing == ["key_proj.weight", "key_proj.bias"]
    inputs = random_inputs(scales)
    expected = without(*inputs, scales)
    assert not torch.allclose(with_proj(*inputs, scales), expected)
    with_proj.key_proj.load_state_dict(without.value_proj.state_dict())
    torch.testing.assert_close(with_proj(*inputs, scales), expected)


@VARIANTS
def test_bfloat16_keeps_locations_exact(make, make_scales):
    """The references stay float32, so that the result is rounded but the places are not."""
    scales = make_scales(((1, 2000), (1, 1)), dtype=torch.float32)
    attention = make(CHANNELS, 2, 2, 2)
    query = torch.randn(1, 1, CHANNELS)
    x = torch.tensor(1503.5 / 2000).expand(1, 1, 2, 1)
    reference = torch.cat([x, torch.full_like(x, 0.5)], dim=-1)
    memory = torch.zeros(1, 2001, CHANNELS)
    memory[:, 1501:1506] = torch.randn(CHANNELS)
    expected = attention(query, reference, memory, scales)
    output = attention.bfloat16()(query.bfloat16(), reference, memory.bfloat16(), scales)
    assert output.dtype == torch.bfloat16
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.02)
