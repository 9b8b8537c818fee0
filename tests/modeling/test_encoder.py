"""The encoders and activation checkpointing of their layers."""

import pytest
import torch
from detectron2.config import instantiate
from small_detectors import gradients, small_config, small_inputs

from lite_detr.modeling import (
    CheckpointedEncoderLayer,
    DeformableEncoder,
    EncoderLayer,
    FeedForward,
    InterleavedEncoder,
    KeyAwareDeformableAttention,
    MultiScaleDeformableAttention,
)
from lite_detr.modeling.layers import clone_layers

SHAPES = ((4, 6), (2, 3), (1, 2), (1, 1))
SIZES = [24, 6, 2, 1]
CHANNELS = 16
# num_high_levels, num_blocks, updates_per_block of the paper's H3L1-(2+1)x3, H3L1-(3+1)x2,
# H3L1-(6+1)x1 and H2L2-(2+1)x3 as released, with six layers each.
VARIANTS = [(3, 3, 2), (3, 2, 3), (3, 1, 6), (2, 3, 2)]


def make_layer(attention_class=MultiScaleDeformableAttention, dropout=0.0):
    attention = attention_class(CHANNELS, num_heads=2, num_levels=4, num_points=2)
    return EncoderLayer(attention, FeedForward(CHANNELS, 24, dropout), dropout)


@pytest.fixture
def inputs(make_scales):
    """Tokens and positions of two images, the second one padded."""
    half = ((2, 3), (1, 2), (1, 1), (1, 1))
    scales = make_scales(SHAPES, (SHAPES, half))
    tokens = torch.randn(2, 33, CHANNELS, dtype=torch.float64)
    return tokens, torch.randn_like(tokens), scales


def record_inputs(modules):
    """The arguments of every later call of each module, in the order of the calls."""
    calls = []
    for module in modules:
        module.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    return calls


def layer_by_hand(layer, query, pos, reference_points, memory, scales):
    attended = layer.self_attn(query + pos, reference_points, memory, scales)
    return layer.norm(query + attended)


def ffn_by_hand(ffn, x):
    hidden = (x @ ffn.linear1.weight.T + ffn.linear1.bias).clamp(min=0)
    return ffn.norm(x + hidden @ ffn.linear2.weight.T + ffn.linear2.bias)


def test_deformable_encoder_equals_unrolled_loop(inputs, perturb):
    tokens, pos, scales = inputs
    encoder = perturb(DeformableEncoder(make_layer(), num_layers=3).double())
    expected = tokens
    for layer in encoder.layers:
        points = scales.reference_points
        attended = layer_by_hand(layer, expected, pos, points, expected, scales)
        expected = ffn_by_hand(layer.ffn, attended)
    torch.testing.assert_close(encoder(tokens, pos, scales), expected)


def test_interleaved_encoder_equals_unrolled_loop(inputs, perturb):
    """Two blocks of two updates, the first scale being the low-level one."""
    tokens, pos, scales = inputs
    encoder = perturb(InterleavedEncoder(make_layer(), 3, 2, 2).double())
    points = scales.reference_points
    high_points, high_pos = points[:, 24:], pos[:, 24:]
    expected = tokens
    for block in range(2):
        first, last = encoder.layers[2 * block], encoder.layers[2 * block + 1]
        low, high = expected[:, :24], expected[:, 24:]
        high = ffn_by_hand(
            first.ffn, layer_by_hand(first, high, high_pos, high_points, expected, scales)
        )
        expected = torch.cat([low, high], dim=1)
        attended = layer_by_hand(last, expected, pos, points, expected, scales)
        low = ffn_by_hand(encoder.low_level_ffns[block], attended[:, :24])
        expected = torch.cat([low, ffn_by_hand(last.ffn, attended[:, 24:])], dim=1)
    torch.testing.assert_close(encoder(tokens, pos, scales), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_queries_of_each_layer(inputs, variant):
    """In all but a block's last layer the high-level tokens alone are queries; all are keys."""
    high_levels, blocks, updates = variant
    tokens, pos, scales = inputs
    encoder = InterleavedEncoder(make_layer(), *variant).double()
    calls = record_inputs([layer.self_attn for layer in encoder.layers])
    encoder(tokens, pos, scales)
    high = sum(SIZES[-high_levels:])
    expected = ([high] * (updates - 1) + [33]) * blocks
    assert len(expected) == 6
    assert [query.shape[1] for query, *_ in calls] == expected
    for query, reference_points, memory, _ in calls:
        start = 33 - query.shape[1]
        assert memory.shape == tokens.shape
        assert torch.equal(reference_points, scales.reference_points[:, start:])


@pytest.mark.parametrize("high_levels", [1, 2, 3])
def test_queries_are_tokens_with_their_own_position(inputs, high_levels):
    tokens, pos, scales = inputs
    encoder = InterleavedEncoder(make_layer(), high_levels, 1, 2).double()
    calls = record_inputs([encoder.layers[0].self_attn])
    encoder(tokens, pos, scales)
    start = 33 - sum(SIZES[-high_levels:])
    assert torch.equal(calls[0][0], (tokens + pos)[:, start:])
    assert torch.equal(calls[0][2], tokens)


@pytest.mark.parametrize("attention", [MultiScaleDeformableAttention, KeyAwareDeformableAttention])
@pytest.mark.parametrize("high_levels, low", [(3, 24), (2, 30)])
def test_low_level_tokens_change_in_the_last_layer_alone(inputs, attention, high_levels, low):
    tokens, pos, scales = inputs
    encoder = InterleavedEncoder(make_layer(attention), high_levels, 1, 4).double()
    calls = record_inputs([layer.self_attn for layer in encoder.layers])
    memory = encoder(tokens, pos, scales)
    memories = [call[2] for call in calls]
    for earlier in memories:
        assert torch.equal(earlier[:, :low], tokens[:, :low])
    for before, after in zip(memories, memories[1:] + [memory]):
        assert (before[:, low:] != after[:, low:]).any(-1).all()
    assert (memory[:, :low] != tokens[:, :low]).any(-1).all()


def test_low_level_tokens_change_once_a_block(inputs):
    tokens, pos, scales = inputs
    encoder = InterleavedEncoder(make_layer(), 3, 3, 2).double()
    calls = record_inputs([layer.self_attn for layer in encoder.layers])
    last = encoder(tokens, pos, scales)
    lows = [call[2][:, :24] for call in calls] + [last[:, :24]]
    changed = [not torch.equal(before, after) for before, after in zip(lows, lows[1:])]
    assert changed == [False, True] * 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_light_ffn_passes_low_level_tokens_only(inputs, variant):
    high_levels, blocks, updates = variant
    tokens, pos, scales = inputs
    encoder = InterleavedEncoder(make_layer(), *variant).double()
    high = sum(SIZES[-high_levels:])
    light = record_inputs(encoder.low_level_ffns)
    full = record_inputs([layer.ffn for layer in encoder.layers])
    encoder(tokens, pos, scales)
    assert [x.shape[1] for (x,) in light] == [33 - high] * blocks
    assert [x.shape[1] for (x,) in full] == [high] * (blocks * updates)


def test_light_ffn_has_the_embeddings_width_and_a_norm_of_its_own():
    encoder = InterleavedEncoder(make_layer(dropout=0.25), 3, 2, 2)
    assert len(encoder.low_level_ffns) == 2
    for ffn in encoder.low_level_ffns:
        assert (ffn.linear1.in_features, ffn.linear1.out_features) == (CHANNELS, CHANNELS)
        assert (ffn.linear2.in_features, ffn.linear2.out_features) == (CHANNELS, CHANNELS)
        assert ffn.dropout.p == 0.25
    light = {id(p) for ffn in encoder.low_level_ffns for p in ffn.parameters()}
    full = {id(p) for layer in encoder.layers for p in layer.parameters()}
    assert len(light) == 2 * 6
    assert not light & full


def test_light_ffn_adds_its_parameters_and_nothing_else():
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    interleaved = InterleavedEncoder(make_layer(), 3, num_blocks=2, updates_per_block=3)
    light = 2 * (CHANNELS * CHANNELS + CHANNELS) + 2 * CHANNELS
    assert count(interleaved) == count(DeformableEncoder(make_layer(), 6)) + 2 * light


def test_clones_start_from_weights_of_their_own():
    layer = make_layer()
    layers = clone_layers(layer, 3)
    names = ("self_attn.value_proj", "self_attn.output_proj", "ffn.linear1", "ffn.linear2")
    for name in names:
        weights = [x.get_submodule(name).weight for x in (layer, *layers)]
        assert len({tuple(weight.flatten().tolist()) for weight in weights}) == 4
    parameters = [id(p) for x in (layer, *layers) for p in x.parameters()]
    assert len(set(parameters)) == len(parameters)


def test_clones_keep_the_offsets_initialisation():
    layer = make_layer()
    for clone in clone_layers(layer, 2):
        assert torch.equal(
            clone.self_attn.sampling_offsets.bias, layer.self_attn.sampling_offsets.bias
        )
        assert not clone.self_attn.sampling_offsets.weight.any()
        assert not clone.self_attn.attention_weights.weight.any()
        assert not clone.self_attn.value_proj.bias.any()


def test_cloning_leaves_the_prototype():
    layer = make_layer()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    clone_layers(layer, 2)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("num_high_levels", [-1, 0, 4, 5])
def test_some_scales_are_high_and_some_low(num_high_levels):
    with pytest.raises(ValueError, match=f"4 scales.*1 to 3.*got {num_high_levels}"):
        InterleavedEncoder(make_layer(), num_high_levels=num_high_levels)


@pytest.mark.parametrize("blocks, updates", [(0, 2), (3, 0), (-1, 2)])
def test_there_is_a_layer(blocks, updates):
    with pytest.raises(ValueError, match=f"at least 1, got {blocks} and {updates}"):
        InterleavedEncoder(make_layer(), 3, num_blocks=blocks, updates_per_block=updates)


def test_dropout_is_off_in_evaluation(inputs):
    tokens, pos, scales = inputs
    encoder = InterleavedEncoder(make_layer(dropout=0.5), 3, 1, 2).double()
    assert not torch.equal(encoder(tokens, pos, scales), encoder(tokens, pos, scales))
    encoder.eval()
    assert torch.equal(encoder(tokens, pos, scales), encoder(tokens, pos, scales))


ENCODERS = pytest.mark.parametrize("encoder", ["full", "interleaved"])


def build(layer, encoder):
    """The same weights each time; with dropout."""
    config = small_config("deformable_detr")
    config.encoder.layer._target_ = layer
    config.encoder.layer.dropout = 0.3
    config.encoder.num_blocks = 2
    if encoder == "full":
        for name in ("num_high_levels", "num_blocks", "updates_per_block"):
            del config.encoder[name]
        config.encoder._target_ = DeformableEncoder
        config.encoder.num_layers = 3
    torch.manual_seed(0)
    return instantiate(config)


def losses_and_gradients(model, precision=None):
    """And how many bytes the encoder keeps for the backward pass."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    encode = model.encoder.forward

    def counted(*args):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return encode(*args)

    model.encoder.forward = counted
    torch.manual_seed(1)
    with torch.autocast("cpu", precision, enabled=precision is not None):
        losses = model(small_inputs(2, 3))
    sum(losses.values()).backward()
    return losses, gradients(model), sum(kept.values())


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@ENCODERS
def test_gradients_are_the_same_to_the_bit_and_less_is_kept(encoder, precision):
    plain, checkpointed = (
        losses_and_gradients(build(layer, encoder), precision)
        for layer in (EncoderLayer, CheckpointedEncoderLayer)
    )
    for expected, found in zip(plain[:2], checkpointed[:2]):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    assert checkpointed[2] < 0.4 * plain[2]


@ENCODERS
def test_weights_have_the_same_names(encoder):
    plain, checkpointed = (
        build(layer, encoder) for layer in (EncoderLayer, CheckpointedEncoderLayer)
    )
    assert list(plain.state_dict()) == list(checkpointed.state_dict())


@ENCODERS
def test_without_gradients_nothing_is_computed_twice(encoder):
    model = build(CheckpointedEncoderLayer, encoder)
    calls = []
    model.encoder.layers[-1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model.forward_queries(small_inputs(0))
    assert len(calls) == 1
    sum(model(small_inputs(1)).values()).backward()
    assert len(calls) == 3
