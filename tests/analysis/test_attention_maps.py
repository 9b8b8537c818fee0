"""What the hook records is what the attentions did, and costs nothing when it is off."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from detectron2.config import instantiate
from programs import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from lite_detr import model_zoo, ops
from lite_detr.analysis.attention_maps import attention_names, record_attention
from lite_detr.errors import UnknownPartError
from lite_detr.modeling import KeyAwareDeformableAttention, MultiScaleDeformableAttention
from lite_detr.modeling.attention import DeformableAttention
from lite_detr.ops import native

NAMES = [
    "encoder.layers.0.self_attn",
    "encoder.layers.1.self_attn",
    "decoder.layers.0.cross_attn",
    "decoder.layers.1.cross_attn",
]
ATTENTIONS = {
    "plain": {"_target_": MultiScaleDeformableAttention},
    "key-aware": {"_target_": KeyAwareDeformableAttention},
    "key_proj": {"_target_": KeyAwareDeformableAttention, "key_proj": True},
}


def make_model(attention="key-aware"):
    """An interleaved encoder of two layers and a decoder of two, with weights of all signs."""
    torch.manual_seed(0)
    cfg = model_zoo.get_config(str(TINY))
    for key, setting in ATTENTIONS[attention].items():
        cfg.model.encoder.layer.attention[key] = setting
    model = instantiate(cfg.model).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DeformableAttention):
                for parameter in module.parameters():
                    parameter += 0.2 * torch.randn_like(parameter)
    return model.double()


@pytest.fixture(scope="module")
def models():
    return {attention: make_model(attention) for attention in ATTENTIONS}


@pytest.fixture(scope="module")
def model(models):
    return models["key-aware"]


@pytest.fixture
def inputs():
    """Two images, the second of which is padded to the first's size."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((64, 96), (48, 40))
    return [{"image": torch.randint(0, 256, (3, *s), generator=generator)} for s in sizes]


def record_calls(model):
    """``{name: (inputs, output)}`` of the attentions, from hooks of the test's own."""
    calls = {}
    for name in attention_names(model):
        model.get_submodule(name).register_forward_hook(
            lambda _, given, output, name=name: calls.update({name: (given, output)})
        )
    return calls


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("backend", ["native", "pytorch"])
def test_recorded_weights_and_locations_reproduce_the_output(
    models, inputs, attention, backend, monkeypatch
):
    if backend == "pytorch":
        monkeypatch.setattr(native, "DEVICES", ())
    elif ops.backend() != "native":
        pytest.skip("needs the native operators")
    model = models[attention]
    calls = record_calls(model)
    with record_attention(model) as maps, torch.no_grad():
        model(inputs)
    assert [record.name for record in maps] == NAMES
    for record in maps:
        (query, _, memory, scales), output = calls[record.name]
        assert record.weights.shape == (2, query.shape[1], 4, 4, 4)
        torch.testing.assert_close(
            record.weights.sum((-2, -1)), torch.ones_like(record.weights[..., 0, 0])
        )
        module = model.get_submodule(record.name)
        sampled = ops.ms_deform_attn_pytorch(
            module.project(module.value_proj, memory, scales),
            scales.spatial_shapes,
            scales.level_start_index,
            record.locations,
            record.weights,
        )
        torch.testing.assert_close(module.output_proj(sampled), output, rtol=0, atol=1e-12)
        assert output.std() > 0.1 and record.weights.std() > 1e-3


@pytest.mark.parametrize("attention", ["plain", "key-aware"])
def test_under_autocast_the_maps_are_those_of_the_rounded_pass(attention, inputs):
    model = make_model(attention).float()
    calls = record_calls(model)
    module = model.get_submodule(NAMES[0])
    rounded = torch.autocast("cpu", torch.bfloat16)
    with record_attention(model, NAMES[:1]) as maps, torch.no_grad(), rounded:
        model(inputs)
        (_, _, memory, scales), output = calls[NAMES[0]]
        value = module.project(module.value_proj, memory, scales)
    sampled = ops.ms_deform_attn_pytorch(
        value.float(),
        scales.spatial_shapes,
        scales.level_start_index,
        maps[0].locations,
        maps[0].weights.float(),
    )
    with torch.no_grad(), rounded:
        expected = module.output_proj(sampled.bfloat16())
    torch.testing.assert_close(output, expected, rtol=2**-6, atol=2**-6)
    assert maps[0].weights.dtype == (torch.bfloat16 if attention == "plain" else torch.float32)


class Operators(TorchDispatchMode):
    """Lists the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operators_of(model, inputs):
    with Operators() as operators, torch.no_grad():
        model(inputs)
    return operators.names


def test_the_same_operators_run_before_and_after(inputs):
    model = make_model()
    before = operators_of(model, inputs)
    with record_attention(model):
        assert len(operators_of(model, inputs)) > len(before)
    assert operators_of(model, inputs) == before
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_gone_after_an_error(model):
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match="stopped"), record_attention(model):
        raise RuntimeError("stopped")
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_predictions_and_gradients_stay_as_they_are(inputs):
    model = make_model()
    alone = model.forward_queries(inputs)
    with record_attention(model):
        recorded = model.forward_queries(inputs)
    for name, tensor in alone.items():
        assert torch.equal(tensor, recorded[name]), name

    with record_attention(model) as maps:
        loss = model.predict(*model.encode(model.preprocess_images(inputs))).boxes.sum()
    assert loss.requires_grad and not maps[0].weights.requires_grad


def test_maps_follow_each_other_over_several_passes(model, inputs):
    with record_attention(model, [NAMES[3], NAMES[0]]) as maps, torch.no_grad():
        model(inputs)
        model(inputs[:1])
    assert [record.name for record in maps] == [NAMES[0], NAMES[3]] * 2
    assert [len(record.weights) for record in maps] == [2, 2, 1, 1]


def test_calls_of_other_threads_are_not_recorded(model, inputs):
    with record_attention(model, NAMES[:1]) as maps, ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(model.forward_queries, inputs[:1]) for _ in range(4)]
        model.forward_queries(inputs)
        for call in calls:
            call.result()
    assert [len(record.weights) for record in maps] == [2]


def test_an_unknown_attention_is_named_with_those_there_are(model):
    with (
        pytest.raises(UnknownPartError, match=r"named encoder\.layers\.6\.self_attn; .*layers\.1"),
        record_attention(model, ["encoder.layers.6.self_attn"]),
    ):
        pass


def test_names_of_a_part_come_in_the_order_of_layers(model):
    assert attention_names(model) == NAMES
    assert attention_names(model, "decoder") == NAMES[2:]


def test_high_level_queries_know_their_scale_and_place(model, inputs):
    """In the first layer of a block all tokens but those of the finest scale are queries."""
    with record_attention(model) as maps, torch.no_grad():
        model(inputs)
    high, all_levels, decoder, _ = maps
    shapes = high.scales.shapes
    assert shapes == ((8, 12), (4, 6), (2, 3), (1, 2))
    assert high.query_levels == (1, 2, 3) and all_levels.query_levels == (0, 1, 2, 3)
    assert decoder.query_levels == () and decoder.level_of(3) is None
    assert [high.level_of(query) for query in (0, 23, 24, 29, 30, 31)] == [1, 1, 2, 2, 3, 3]
    # The second cell of the second row of the 4 x 6 map.
    assert high.point_of(7) == pytest.approx((1.5 / 6, 1.5 / 4))
    assert all_levels.point_of(96 + 7) == high.point_of(7)


def test_the_nearest_query_is_a_token_of_the_finest_scale_that_is_updated(model, inputs):
    with record_attention(model) as maps, torch.no_grad():
        model(inputs)
    high, all_levels, decoder, _ = maps
    assert high.nearest_query((0.3, 0.6)) == 2 * 6 + 1
    assert all_levels.nearest_query((0.3, 0.6)) == 4 * 12 + 3
    # The padded image covers 6 x 5 of the 8 x 12 cells: its last one is at their corner.
    assert all_levels.nearest_query((0.99, 0.99), image=1) == 5 * 12 + 4
    for query in (0, 4, 9):
        point = decoder.point_of(query, image=1)
        # Several may have a point, such as the image's corner.
        assert decoder.point_of(decoder.nearest_query(point, image=1), image=1) == point


def test_the_strongest_samples_are_those_of_a_search_by_hand(model, inputs):
    with record_attention(model, NAMES[:1]) as maps, torch.no_grad():
        model(inputs)
    (record,) = maps
    found = record.strongest(16, image=1, query=7, level=0)
    candidates = []
    for head in range(4):
        for point in range(4):
            place = record.locations[1, 7, head, 0, point] / record.scales.valid_ratios[1, 0]
            if place.min() >= 0 and place.max() <= 1:
                candidates.append((record.weights[1, 7, head, 0, point].item(), *place.tolist()))
    candidates.sort(reverse=True)
    assert 1 < len(candidates) < 16
    given = [(w.item(), *p.tolist()) for w, p in zip(found.weights, found.points)]
    assert given == candidates
    assert found.levels.tolist() == [0] * len(given)


def test_the_strongest_samples_of_all_queries_leave_padding_out(model, inputs):
    with record_attention(model, NAMES[:2]) as maps, torch.no_grad():
        model(inputs)
    for record in maps:
        found = record.strongest(10**6, image=1)
        assert (found.weights.diff() <= 0).all() and set(found.levels.tolist()) == {0, 1, 2, 3}
        assert ((found.points >= 0) & (found.points <= 1)).all()
        real = ~record.scales.padding_mask[1, record.first_token :]
        heaviest = record.weights[1, real].flatten()
        assert len(found.weights) < len(heaviest)
        assert torch.isin(found.weights, heaviest).all()
        assert record.strongest(5, image=1).weights.tolist() == found.weights[:5].tolist()


def test_an_attention_says_that_its_weights_are_missing():
    with pytest.raises(NotImplementedError, match="must define `point_weights`"):
        DeformableAttention(16, 2, 1, 1).point_weights(None, None, None, None)
