import functools

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from small_detectors import (
    CLASSES,
    QUERIES,
    WIDTH,
    assert_infers,
    assert_trains,
    count,
    loss_names,
    record,
)
from torch import nn

from lite_detr.modeling import (
    DINO,
    ContrastiveDenoising,
    DecoderLayer,
    DeformableDecoder,
    FeedForward,
    MultiScaleDeformableAttention,
    PredictionHeads,
    ReferencePosition,
)
from lite_detr.modeling.heads import Predictions
from lite_detr.modeling.queries import Queries

ENCODERS = pytest.mark.parametrize("encoder", ["full", "interleaved"])
ATTENTIONS = pytest.mark.parametrize("attention", ["msda", "kda"])
MATCHING = ("", "_0", "_enc")
DENOISING = ("_dn", "_dn_0")


@pytest.fixture
def make_dino(make_detector):
    """``make_dino(encoder, attention, denoising)``: a model without dropout."""
    return functools.partial(make_detector, "dino", denoising=True)


@pytest.fixture
def batch(make_input):
    """Three objects, none, and one: three groups of denoising queries."""
    return [make_input(64, 96, objects=3), make_input(48, 64), make_input(64, 64, objects=1)]


@ENCODERS
@ATTENTIONS
def test_training(make_dino, batch, perturb, encoder, attention):
    model = perturb(make_dino(encoder, attention), std=0.05)
    assert_trains(model, batch, loss_names(*MATCHING, *DENOISING))


@ENCODERS
@ATTENTIONS
def test_inference(make_dino, make_input, perturb, encoder, attention):
    """Of the matching queries alone."""
    assert_infers(perturb(make_dino(encoder, attention)), make_input, QUERIES, CLASSES)


def test_inference_does_without_denoising(make_dino, make_input, perturb):
    model = perturb(make_dino()).eval()
    inputs = [make_input(64, 96, objects=2)]
    expected = model.forward_queries(inputs)
    with torch.no_grad():
        model.denoising.label_embed.weight.normal_()
    called = record(model.denoising)
    outputs = [model.forward_queries(inputs)]
    assert not called
    model.denoising = None
    outputs.append(model.forward_queries(inputs))
    for output in outputs:
        for name, tensor in expected.items():
            assert torch.equal(output[name], tensor)


@ENCODERS
def test_matching_losses_are_the_same_without_denoising(make_dino, batch, perturb, encoder):
    """The matching queries see no denoising query, so that these change nothing about them."""
    model = perturb(make_dino(encoder)).double()
    losses = model(batch)
    model.denoising = None
    without = model(batch)
    assert set(without) == loss_names(*MATCHING)
    for name, loss in without.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-9, atol=1e-12)


def test_training_without_denoising(make_dino, batch, perturb):
    model = perturb(make_dino(denoising=False), std=0.05)
    losses = model(batch)
    assert set(losses) == loss_names(*MATCHING)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_denoising_queries_see_the_matching_ones_and_not_the_reverse(make_dino, batch, perturb):
    model = perturb(make_dino())
    losses = model(batch)
    for names, through, expected in (
        (loss_names(*MATCHING), model.denoising.label_embed, False),
        (loss_names(*DENOISING), model.denoising.label_embed, True),
        (loss_names(*DENOISING), model.queries.content, True),
        (loss_names("", "_0"), model.queries.content, True),
    ):
        loss = sum(losses[name] for name in names)
        (gradient,) = torch.autograd.grad(
            loss, through.weight, retain_graph=True, allow_unused=True
        )
        assert (gradient is not None and bool(gradient.any())) is expected


def test_denoising_losses_are_the_mean_over_the_groups(make_dino, batch, perturb):
    """Each group by itself: positives restore their objects, all others predict none."""
    model = perturb(make_dino()).double()
    decoded, noised = record(model.decoder), record(model.denoising)
    losses = model(batch)
    targets = model.prepare_targets(batch, model.encode(model.preprocess_images(batch))[1])
    groups = noised[0].num_groups
    assert groups == 3
    assert noised[0].queries.content.shape[1] == 3 * 2 * 3
    assert decoded[0][0].logits.shape[1] == 3 * 2 * 3 + QUERIES
    for suffix, (logits, boxes) in zip(("_dn_0", "_dn"), decoded[0], strict=True):
        total = dict.fromkeys(("loss_ce", "loss_bbox", "loss_giou"), 0.0)
        for group in range(groups):
            part = slice(6 * group, 6 * group + 6)
            predictions = Predictions(logits[:, part], boxes[:, part])
            matches = [(torch.arange(n), torch.arange(n)) for n in (3, 0, 1)]
            found = model.criterion({"": predictions}, targets, count(targets), matches)
            total = {name: total[name] + found[name] for name in total}
        for name, loss in total.items():
            torch.testing.assert_close(losses[name + suffix], loss / groups)


def test_proposals_are_trained_on_their_classes(make_dino, batch, perturb):
    """The encoder's loss has the objects' own classes, not one class for all as elsewhere."""
    model = perturb(make_dino()).double()
    chosen = record(model.queries)
    losses = model(batch)
    targets = model.prepare_targets(batch, model.encode(model.preprocess_images(batch))[1])
    assert any(target.labels.any() for target in targets)
    _, proposals = chosen[0]
    assert proposals.boxes.shape == (3, QUERIES, 4)
    for name, loss in model.criterion({"_enc": proposals}, targets, count(targets)).items():
        torch.testing.assert_close(losses[name], loss)


@pytest.mark.parametrize("images", [1, 2])
def test_training_without_objects(make_dino, make_input, images):
    """The same losses, and a gradient for every parameter, as DistributedDataParallel needs."""
    model = make_dino()
    losses = model([make_input(64, 96)] * images)
    assert set(losses) == loss_names(*MATCHING, *DENOISING)
    assert all(loss.isfinite() for loss in losses.values())
    for name, loss in losses.items():
        assert loss > 0 if "_ce" in name and "_dn" not in name else loss == 0, name
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert not model.denoising.label_embed.weight.grad.any()


def test_more_objects_than_queries(make_dino, make_input):
    model = make_dino()
    losses = model([make_input(64, 64, objects=20), make_input(64, 64, objects=2)])
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("sizes", [[(1, 1)], [(1, 200), (150, 3)]], ids=str)
def test_tiny_images(make_dino, make_input, sizes):
    """Down to four tokens, which are fewer than the queries."""
    model = make_dino()
    inputs = [make_input(*size, objects=1) for size in sizes]
    sum(model(inputs).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for output, size in zip(model.eval()(inputs), sizes):
        assert output["instances"].image_size == size
        assert output["instances"].pred_boxes.tensor.isfinite().all()


def test_mixed_precision(make_dino, batch):
    model = make_dino("interleaved", "kda", denoising=False)
    expected = sum(model(batch).values())
    model.denoising = ContrastiveDenoising(WIDTH, CLASSES, num_queries=9)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    total = sum(losses[name] for name in loss_names(*MATCHING))
    torch.testing.assert_close(total, expected, rtol=0.02, atol=0)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_registered_with_detectron2():
    assert META_ARCH_REGISTRY.get("DINO") is DINO


def make_decoder(shared=True, **options):
    attention = MultiScaleDeformableAttention(16, num_heads=2, num_levels=2, num_points=2)
    layer = DecoderLayer(attention, FeedForward(16, 24, 0.0), dropout=0.0)
    heads = PredictionHeads(16, 4, num_layers=3, shared=shared, border=1e-3)
    return DeformableDecoder(layer, heads, query_pos=ReferencePosition(16), **options).double()


@pytest.fixture
def decoder_inputs(make_scales):
    """Queries, memory and scales of two images, the second one padded."""
    scales = make_scales(((3, 4), (2, 2)), (((3, 4), (2, 2)), ((3, 2), (1, 1))))
    content, memory = torch.randn(2, 5, 16).double(), torch.randn(2, 16, 16).double()
    return Queries(content, None, 0.2 + 0.6 * torch.rand(2, 5, 4).double()), memory, scales


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("look_forward_twice", [True, False])
def test_decoder_by_hand(decoder_inputs, perturb, with_norm, look_forward_twice):
    """Heads see normed queries; positions and look-forward references come from those before it."""
    norm = nn.LayerNorm(16) if with_norm else None
    decoder = perturb(make_decoder(look_forward_twice=look_forward_twice, norm=norm))
    queries, memory, scales = decoder_inputs
    head = decoder.heads.bbox_embed[0]
    content, reference = queries.content, queries.reference
    for layer, (logits, boxes) in zip(decoder.layers, decoder(*decoder_inputs), strict=True):
        ratios = scales.valid_ratios.repeat(1, 1, 2)
        points = torch.stack([reference * ratios[:, level, None] for level in range(2)], dim=2)
        pos = decoder.query_pos(points[:, :, 0])
        content = layer(content, pos, points, memory, scales)
        state = decoder.norm(content) if with_norm else content
        torch.testing.assert_close(logits, decoder.heads.class_embed[0](state))
        torch.testing.assert_close(boxes, (reference.logit() + head(state)).sigmoid())
        seen = content if look_forward_twice else state
        reference = (reference.logit() + head(seen)).sigmoid()


@pytest.mark.parametrize("look_forward_twice", [True, False])
def test_look_forward_twice(decoder_inputs, perturb, look_forward_twice):
    """A layer's boxes train the box head of the layer before it as well, and no earlier one."""
    decoder = make_decoder(shared=False, look_forward_twice=look_forward_twice)
    predictions = perturb(decoder)(*decoder_inputs)
    for index in range(3):
        trained = []
        for head in decoder.heads.bbox_embed:
            gradients = torch.autograd.grad(
                predictions[index].boxes.square().sum(),
                list(head.parameters()),
                retain_graph=True,
                allow_unused=True,
            )
            trained.append(any(grad is not None and grad.any() for grad in gradients))
        before = [index - 1] if look_forward_twice else []
        assert [i for i, is_trained in enumerate(trained) if is_trained] == [
            *(i for i in before if i >= 0),
            index,
        ]


def test_references_at_the_border_count_as_a_thousandth_inside(decoder_inputs):
    heads = make_decoder().heads
    reference = torch.tensor([[[0.0, 1.0, 1e-6, 0.5]]], dtype=torch.float64)
    boxes = heads.refine(0, torch.randn(1, 1, 16).double(), reference)
    expected = torch.tensor([[[1 / 1001, 1000 / 1001, 1 / 1001, 0.5]]], dtype=torch.float64)
    torch.testing.assert_close(boxes, expected, rtol=0, atol=1e-8)
