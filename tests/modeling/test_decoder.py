import math

import pytest
import torch

from lite_detr.modeling import (
    DecoderLayer,
    DeformableDecoder,
    FeedForward,
    KeyAwareDeformableAttention,
    MultiScaleDeformableAttention,
    PredictionHeads,
)
from lite_detr.modeling.heads import inverse_sigmoid, move_reference
from lite_detr.modeling.layers import clone_layers
from lite_detr.modeling.queries import Queries

SHAPES = ((3, 4), (2, 2))
CHANNELS = 16
QUERIES = 5


def make_layer(attention_class=MultiScaleDeformableAttention):
    attention = attention_class(CHANNELS, num_heads=2, num_levels=2, num_points=2)
    return DecoderLayer(attention, FeedForward(CHANNELS, 24, 0.0), dropout=0.0)


def make_decoder(refine=True, num_layers=3, **heads):
    heads = PredictionHeads(CHANNELS, 4, num_layers, **heads)
    return DeformableDecoder(make_layer(), heads, refine).double()


def rand(*shape):
    return torch.rand(shape, dtype=torch.float64)


def make_queries(reference_dim, batch=2):
    content = torch.randn(batch, QUERIES, CHANNELS, dtype=torch.float64)
    reference = rand(batch, QUERIES, reference_dim) * 0.6 + 0.2
    return Queries(content, torch.randn_like(content), reference)


@pytest.fixture
def encoded(make_scales):
    """Memory and scales of two images, the second one padded."""
    scales = make_scales(SHAPES, (SHAPES, ((3, 2), (1, 1))))
    return torch.randn(2, 16, CHANNELS, dtype=torch.float64), scales


def record_references(decoder):
    references = []
    for layer in decoder.layers:
        layer.cross_attn.register_forward_pre_hook(lambda _, args: references.append(args[1]))
    return references


def in_padded_frames(reference, scales):
    """[B, Q, L, 2 or 4]: x and width shrink by a scale's horizontal valid ratio, and so on."""
    expected = reference.new_empty(2, QUERIES, 2, reference.shape[-1])
    for image in range(2):
        for level in range(2):
            ratio_x, ratio_y = scales.valid_ratios[image, level].tolist()
            ratios = reference.new_tensor([ratio_x, ratio_y] * (reference.shape[-1] // 2))
            expected[image, :, level] = reference[image] * ratios
    return expected


def test_classes_start_at_probability_one_percent():
    heads = PredictionHeads(CHANNELS, 7, num_layers=2)
    for layer in range(2):
        probability = heads.classify(layer, torch.zeros(1, 1, CHANNELS)).sigmoid()
        torch.testing.assert_close(probability, torch.full((1, 1, 7), 0.01))


@pytest.mark.parametrize("size_bias", [0.0, -2.0])
def test_boxes_start_at_the_reference(size_bias):
    """With a point the size starts at the sigmoid of the bias, in the first layer alone."""
    heads = PredictionHeads(CHANNELS, 7, num_layers=2, size_bias=size_bias).double()
    content, _, box = make_queries(4)
    torch.testing.assert_close(heads.refine(1, content, box), box)
    size = 1 / (1 + math.exp(-size_bias))
    expected = torch.cat([box[..., :2], torch.full_like(box[..., 2:], size)], dim=-1)
    torch.testing.assert_close(heads.refine(0, content, box[..., :2]), expected)


def test_initial_size_of_deformable_detr_is_12_percent():
    heads = PredictionHeads(CHANNELS, 7, num_layers=1, size_bias=-2.0)
    boxes = heads.refine(0, torch.randn(1, 1, CHANNELS), torch.rand(1, 1, 2))
    torch.testing.assert_close(boxes[..., 2:], torch.full((1, 1, 2), 0.1192), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shared, pairs", [(True, 1), (False, 3)])
def test_shared_heads(perturb, shared, pairs):
    heads = perturb(PredictionHeads(CHANNELS, 7, num_layers=3, shared=shared).double())
    content, _, reference = make_queries(4)
    assert (len(heads.class_embed), len(heads.bbox_embed)) == (pairs, pairs)
    logits = {tuple(heads.classify(i, content).flatten().tolist()) for i in range(3)}
    boxes = {tuple(heads.refine(i, content, reference).flatten().tolist()) for i in range(3)}
    assert (len(logits), len(boxes)) == (pairs, pairs)


@pytest.mark.parametrize("shared", [True, False])
def test_heads_say_how_many_layers_there_are(shared):
    assert len(make_decoder(num_layers=4, shared=shared).layers) == 4


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("reference_dim", [2, 4])
def test_move_reference_by_hand(reference_dim):
    reference = [0.2, 0.7, 0.4, 0.9][:reference_dim]
    delta = [0.5, -1.5, 2.0, -0.25]
    logits = [math.log(r / (1 - r)) for r in reference] + [0.0] * (4 - reference_dim)
    expected = [sigmoid(logit + d) for logit, d in zip(logits, delta)]
    tensors = [torch.tensor(x, dtype=torch.float64).view(1, 1, -1) for x in (reference, delta)]
    assert move_reference(*tensors).flatten().tolist() == pytest.approx(expected, abs=1e-12)


def test_move_reference_keeps_the_references_precision():
    boxes = move_reference(torch.rand(1, 3, 4), torch.zeros(1, 3, 4, dtype=torch.bfloat16))
    assert boxes.dtype == torch.float32


def test_inverse_sigmoid_inverts_the_sigmoid():
    logits = torch.linspace(-11, 11, 45, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(logits.sigmoid()), logits)


def test_inverse_sigmoid_is_finite_at_and_beyond_the_ends():
    end = math.log(1e5)
    values = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1e-7, 1.0, 2.0], dtype=torch.float64))
    expected = torch.tensor([-end, -end, -end, end, end], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)
    ends = torch.tensor([0.0, 1.0], requires_grad=True)
    inverse_sigmoid(ends).sum().backward()
    assert ends.grad.isfinite().all()


def self_attention_by_hand(attention, query, value):
    """Two heads of softmax(q k^T / sqrt(D)) v, written out."""
    weight_q, weight_k, weight_v = attention.in_proj_weight.chunk(3)
    bias_q, bias_k, bias_v = attention.in_proj_bias.chunk(3)
    q, k = query @ weight_q.T + bias_q, query @ weight_k.T + bias_k
    v = value @ weight_v.T + bias_v
    heads = []
    for part in (slice(0, 8), slice(8, 16)):
        logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(8)
        heads.append(logits.softmax(-1) @ v[..., part])
    return torch.cat(heads, dim=-1) @ attention.out_proj.weight.T + attention.out_proj.bias


@pytest.mark.parametrize("attention", [MultiScaleDeformableAttention, KeyAwareDeformableAttention])
def test_layer_by_hand(encoded, perturb, attention):
    """The position is part of queries and keys, not of values or of the residual."""
    layer = perturb(make_layer(attention).double())
    content, pos, reference = make_queries(4)
    reference_points = in_padded_frames(reference, encoded[1])
    attended = self_attention_by_hand(layer.self_attn, content + pos, content)
    x = layer.self_attn_norm(content + attended)
    x = layer.cross_attn_norm(x + layer.cross_attn(x + pos, reference_points, *encoded))
    hidden = (x @ layer.ffn.linear1.weight.T + layer.ffn.linear1.bias).clamp(min=0)
    expected = layer.ffn.norm(x + hidden @ layer.ffn.linear2.weight.T + layer.ffn.linear2.bias)
    torch.testing.assert_close(layer(content, pos, reference_points, *encoded), expected)


def test_clones_of_a_layer_draw_their_self_attention_anew():
    layer = make_layer()
    layers = [layer, *clone_layers(layer, 2)]
    for name in ("in_proj_weight", "out_proj.weight"):
        weights = [x.self_attn.get_parameter(name) for x in layers]
        assert len({tuple(weight.flatten().tolist()) for weight in weights}) == 3
        bound = math.sqrt(6 / sum(weights[0].shape))
        assert all(0.9 * bound < weight.abs().max() <= bound for weight in weights)
    for x in layers:
        assert not x.self_attn.in_proj_bias.any()
        assert not x.self_attn.out_proj.bias.any()


@pytest.mark.parametrize("reference_dim", [2, 4])
def test_without_refinement_all_layers_share_the_first_references(encoded, perturb, reference_dim):
    decoder = perturb(make_decoder(refine=False))
    queries = make_queries(reference_dim)
    references = record_references(decoder)
    predictions = decoder(queries, *encoded)
    assert len(references) == len(predictions) == 3
    for reference in references:
        torch.testing.assert_close(reference, in_padded_frames(queries.reference, encoded[1]))


@pytest.mark.parametrize("reference_dim", [2, 4])
def test_refinement_hands_each_layers_boxes_to_the_next(encoded, perturb, reference_dim):
    decoder = perturb(make_decoder(refine=True))
    queries = make_queries(reference_dim)
    references = record_references(decoder)
    predictions = decoder(queries, *encoded)
    expected = [queries.reference] + [layer.boxes for layer in predictions[:2]]
    for reference, boxes in zip(references, expected, strict=True):
        torch.testing.assert_close(reference, in_padded_frames(boxes, encoded[1]))
    assert not torch.allclose(predictions[0].boxes[..., :2], queries.reference[..., :2])
    assert not torch.allclose(predictions[1].boxes, predictions[0].boxes)


@pytest.mark.parametrize("refine", [True, False])
def test_predictions_move_the_references_that_a_layer_was_given(encoded, perturb, refine):
    decoder = perturb(make_decoder(refine))
    queries = make_queries(4)
    contents = []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda _, args, output: contents.append(output))
    predictions = decoder(queries, *encoded)
    reference = queries.reference
    for index, (content, layer) in enumerate(zip(contents, predictions, strict=True)):
        logits = torch.log(reference / (1 - reference)) + decoder.heads.bbox_embed[index](content)
        torch.testing.assert_close(layer.boxes, logits.sigmoid())
        torch.testing.assert_close(layer.logits, decoder.heads.class_embed[index](content))
        reference = layer.boxes if refine else queries.reference


def test_no_gradient_flows_through_refined_references(encoded, perturb):
    """The second layer's loss trains the first layer, but not what that predicts boxes with."""
    decoder = perturb(make_decoder(refine=True, num_layers=2))
    queries = make_queries(2)
    first, second = decoder(queries, *encoded)
    assert not torch.allclose(first.boxes[..., :2], queries.reference)

    def gradients(loss, module):
        return torch.autograd.grad(
            loss, list(module.parameters()), allow_unused=True, retain_graph=True
        )

    loss = second.boxes.sum() + second.logits.sum()
    assert all(grad is None for grad in gradients(loss, decoder.heads.bbox_embed[0]))
    assert all(grad is not None for grad in gradients(loss, decoder.heads.bbox_embed[1]))
    assert all(grad is not None for grad in gradients(loss, decoder.layers[0]))
    assert all(grad.any() for grad in gradients(first.boxes.sum(), decoder.heads.bbox_embed[0]))


def test_attn_mask_isolates_queries(encoded, perturb):
    decoder = perturb(make_decoder())
    queries = make_queries(4)
    other_content = queries.content.clone()
    other_content[:, 2:] = torch.randn_like(other_content[:, 2:])
    other = queries._replace(content=other_content)
    mask = torch.zeros(QUERIES, QUERIES, dtype=torch.bool)
    mask[:2, 2:] = True

    def first_two(queries, mask):
        return torch.cat([x[:, :2] for x in decoder(queries, *encoded, mask)[-1]], dim=-1)

    isolated = first_two(queries, mask)
    torch.testing.assert_close(first_two(other, mask), isolated, rtol=0, atol=1e-14)
    assert not torch.allclose(first_two(queries, None), isolated)
    assert not torch.allclose(first_two(other, None), first_two(queries, None))
    empty = torch.zeros_like(mask)
    torch.testing.assert_close(first_two(queries, empty), first_two(queries, None))
