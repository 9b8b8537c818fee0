import functools

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from small_detectors import (
    CLASSES,
    ONE_TO_MANY,
    QUERIES,
    assert_infers,
    assert_trains,
    count,
    loss_names,
    record,
    small_config,
)

from lite_detr.modeling import HDETR
from lite_detr.modeling.criterion import Target
from lite_detr.modeling.heads import Predictions

ENCODERS = pytest.mark.parametrize("encoder", ["full", "interleaved"])
ATTENTIONS = pytest.mark.parametrize("attention", ["msda", "kda"])
MATCHED_ONCE = ("", "_0", "_enc")
MATCHED_OFTEN = ("_one2many", "_one2many_0")


@pytest.fixture
def make_h_detr(make_detector):
    """``make_h_detr(encoder, attention, **options)``: a model without dropout."""
    return functools.partial(make_detector, "h_detr", one_to_many=3)


@pytest.fixture
def batch(make_input):
    return [make_input(64, 96, objects=3), make_input(48, 64), make_input(64, 64, objects=1)]


@ENCODERS
@ATTENTIONS
def test_training(make_h_detr, batch, perturb, encoder, attention):
    model = perturb(make_h_detr(encoder, attention), std=0.05)
    assert_trains(model, batch, loss_names(*MATCHED_ONCE, *MATCHED_OFTEN))


@ENCODERS
@ATTENTIONS
def test_inference(make_h_detr, make_input, perturb, encoder, attention):
    """Of the one-to-one queries alone."""
    assert_infers(perturb(make_h_detr(encoder, attention)), make_input, QUERIES, CLASSES)


def test_inference_does_without_one_to_many_queries(make_h_detr, make_input, perturb):
    model = perturb(make_h_detr())
    inputs = [make_input(64, 96)]
    expected = model.forward_queries(inputs)
    with torch.no_grad():
        model.queries.content.weight[QUERIES:].normal_()
    model.one_to_many, model.weight_one_to_many = 1, 0.0
    for name, tensor in model.forward_queries(inputs).items():
        assert torch.equal(tensor, expected[name])
    with torch.no_grad():
        model.queries.content.weight[:QUERIES].normal_()
    changed = model.forward_queries(inputs)["pred_logits"]
    assert not torch.allclose(changed, expected["pred_logits"])


@pytest.mark.parametrize("changed", range(0, QUERIES + ONE_TO_MANY, 5))
def test_the_two_kinds_of_queries_do_not_see_each_other(make_h_detr, batch, perturb, changed):
    """In training a query's content changes all predictions of its kind and none of the other."""
    model = perturb(make_h_detr()).double()
    decoded = record(model.decoder)
    model(batch)
    with torch.no_grad():
        model.queries.content.weight[changed] += 1.0
    model(batch)
    kinds = slice(0, QUERIES), slice(QUERIES, None)
    own, other = kinds if changed < QUERIES else kinds[::-1]
    for before, after in zip(*decoded, strict=True):
        assert before.logits.shape == (3, QUERIES + ONE_TO_MANY, CLASSES)
        torch.testing.assert_close(after.logits[:, other], before.logits[:, other])
        torch.testing.assert_close(after.boxes[:, other], before.boxes[:, other])
        difference = (after.logits - before.logits)[:, own].abs().amax(-1)
        assert (difference > 1e-8).all()


def test_one_to_many_losses_are_those_of_repeated_targets(make_h_detr, batch, perturb):
    """Each object is there three times: as many queries answer for it, and losses are means."""
    model = perturb(make_h_detr(one_to_many=3)).double()
    decoded = record(model.decoder)
    losses = model(batch)
    targets = model.prepare_targets(batch, model.encode(model.preprocess_images(batch))[1])
    repeated = [
        Target(torch.cat([target.labels] * 3), torch.cat([target.boxes] * 3)) for target in targets
    ]
    for suffix, (logits, boxes) in zip(("_one2many_0", "_one2many"), decoded[0], strict=True):
        predictions = Predictions(logits[:, QUERIES:], boxes[:, QUERIES:])
        for name, loss in model.criterion({"": predictions}, repeated, count(repeated)).items():
            torch.testing.assert_close(losses[name + suffix], loss)
        queries, objects = model.criterion.matcher(predictions, repeated)[0]
        assert len(set(queries.tolist())) == 9
        assert sorted((objects % 3).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_one_to_one_losses_are_those_of_the_targets(make_h_detr, batch, perturb):
    """With labels as they are; the encoder's proposals only tell objects from background."""
    model = perturb(make_h_detr()).double()
    decoded, chosen = record(model.decoder), record(model.queries)
    losses = model(batch)
    targets = model.prepare_targets(batch, model.encode(model.preprocess_images(batch))[1])
    assert any(target.labels.any() for target in targets)
    for suffix, (logits, boxes) in zip(("_0", ""), decoded[0], strict=True):
        predictions = Predictions(logits[:, :QUERIES], boxes[:, :QUERIES])
        for name, loss in model.criterion({"": predictions}, targets, count(targets)).items():
            torch.testing.assert_close(losses[name + suffix], loss)
    objects = [target._replace(labels=torch.zeros_like(target.labels)) for target in targets]
    for name, loss in model.criterion({"_enc": chosen[0][1]}, objects, count(objects)).items():
        torch.testing.assert_close(losses[name], loss)


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_weight_of_the_one_to_many_losses(make_h_detr, batch, perturb, weight):
    model = perturb(make_h_detr()).double()
    expected = model(batch)
    model.weight_one_to_many = weight
    for name, loss in model(batch).items():
        factor = weight if "_one2many" in name else 1.0
        torch.testing.assert_close(loss, factor * expected[name])


def test_one_to_one_losses_are_the_same_without_one_to_many_queries(make_h_detr, batch, perturb):
    model = perturb(make_h_detr()).double()
    losses = model(batch)
    model.queries.num_one_to_many = 0
    without = model(batch)
    assert set(without) == set(losses)
    for name in loss_names(*MATCHED_ONCE):
        torch.testing.assert_close(without[name], losses[name])
    assert all(without[name] == 0 for name in loss_names(*MATCHED_OFTEN))


def test_training_without_objects(make_h_detr, make_input):
    model = make_h_detr()
    losses = model([make_input(64, 96), make_input(64, 64)])
    assert set(losses) == loss_names(*MATCHED_ONCE, *MATCHED_OFTEN)
    for name, loss in losses.items():
        assert loss.isfinite()
        assert loss > 0 if "_ce" in name else loss == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_more_repeated_objects_than_queries(make_h_detr, make_input):
    model = make_h_detr()
    losses = model([make_input(64, 64, objects=10), make_input(64, 64)])
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("sizes", [[(1, 1)], [(40, 40)], [(1, 200), (150, 3)]], ids=str)
def test_tiny_images(make_h_detr, make_input, sizes):
    """Down to four tokens, which are fewer than the queries of one kind; then there is but one."""
    model = make_h_detr()
    inputs = [make_input(*size, objects=1) for size in sizes]
    losses = model(inputs)
    assert set(losses) == loss_names(*MATCHED_ONCE, *MATCHED_OFTEN)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for output, size in zip(model.eval()(inputs), sizes):
        assert output["instances"].image_size == size
        assert output["instances"].pred_boxes.tensor.isfinite().all()


def test_mixed_precision(make_h_detr, batch):
    model = make_h_detr("interleaved", "kda")
    expected = sum(model(batch).values())
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    total = sum(losses.values())
    torch.testing.assert_close(total, expected, rtol=0.02, atol=0)
    total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("look_forward_twice", [True, False])
def test_look_forward_twice(batch, perturb, look_forward_twice):
    """The second layer's boxes train the first layer's box head, through the references only."""
    config = small_config("h_detr", one_to_many=3)
    config.decoder.look_forward_twice = look_forward_twice
    model = perturb(instantiate(config))
    losses = model(batch)
    loss = losses["loss_bbox"] + losses["loss_bbox_one2many"]
    first, second = (
        torch.autograd.grad(loss, list(head.parameters()), retain_graph=True, allow_unused=True)
        for head in model.decoder.heads.bbox_embed
    )
    assert all(grad is not None and grad.any() for grad in second)
    if look_forward_twice:
        assert all(grad is not None and grad.any() for grad in first)
    else:
        assert all(grad is None for grad in first)


def test_registered_with_detectron2():
    assert META_ARCH_REGISTRY.get("HDETR") is HDETR
