"""Encoder layers that are computed twice."""

import pytest
import torch
from detectron2.config import instantiate
from small_detectors import gradients, small_config, small_inputs

from lite_detr.modeling import CheckpointedEncoderLayer, DeformableEncoder, EncoderLayer

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
