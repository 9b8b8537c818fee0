import math

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.structures import ImageList
from small_detectors import QUERIES, encode_maps, small_config

from lite_detr.modeling import DeformableDETR
from lite_detr.modeling.detector import padding_mask

FORMS = pytest.mark.parametrize("form", ["single_stage", "refine", "two_stage"])
ENCODERS = pytest.mark.parametrize("encoder", ["full", "interleaved"])
ATTENTIONS = pytest.mark.parametrize("attention", ["msda", "kda"])


@FORMS
@ENCODERS
@ATTENTIONS
def test_training(make_detector, make_input, perturb, form, encoder, attention):
    """Losses of every prediction, and a gradient for every parameter."""
    model = perturb(make_detector(form, encoder, attention), std=0.05)
    losses = model([make_input(64, 96, objects=3), make_input(48, 64), make_input(64, 64, 1)])
    suffixes = ["", "_0"] + (["_enc"] if form == "two_stage" else [])
    names = {f"loss_{part}{suffix}" for part in ("ce", "bbox", "giou") for suffix in suffixes}
    assert set(losses) == names
    assert all(loss.dim() == 0 and loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@FORMS
def test_training_without_objects(make_detector, make_input, form):
    model = make_detector(form)
    losses = model([make_input(64, 96), make_input(64, 64)])
    for name, loss in losses.items():
        assert loss > 0 if "_ce" in name else loss == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def detections_by_hand(logits, boxes, size, limit, threshold):
    """(score, class, x0, y0, x1, y1) of the best pairs of query and class in a (height, width)."""
    height, width = size
    detections = []
    for row, (cx, cy, w, h) in zip(logits.tolist(), boxes.tolist()):
        xs = [min(max(x * width, 0), width) for x in (cx - w / 2, cx + w / 2)]
        ys = [min(max(y * height, 0), height) for y in (cy - h / 2, cy + h / 2)]
        for label, logit in enumerate(row):
            score = 1 / (1 + math.exp(-logit))
            if score > threshold:
                detections.append((score, label, xs[0], ys[0], xs[1], ys[1]))
    return sorted(detections, reverse=True)[:limit]


@FORMS
@ENCODERS
@ATTENTIONS
def test_inference(make_detector, make_input, perturb, form, encoder, attention):
    """Best first, in the coordinates asked for, or else in the image's own."""
    model = perturb(make_detector(form, encoder, attention, detections_per_image=20)).eval()
    inputs = [make_input(64, 96) | {"height": 32, "width": 480}, make_input(80, 64)]
    outputs = model(inputs)
    raw = model.forward_queries(inputs)
    for index, size in enumerate([(32, 480), (80, 64)]):
        instances = outputs[index]["instances"]
        assert instances.image_size == size
        assert set(instances.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
        expected = detections_by_hand(
            raw["pred_logits"][index], raw["pred_boxes"][index], size, 20, 0.0
        )
        assert len(expected) == len(instances) == 20
        scores, labels, *corners = (torch.tensor(column) for column in zip(*expected))
        torch.testing.assert_close(instances.scores, scores)
        assert torch.equal(instances.pred_classes, labels)
        boxes = torch.stack(corners, dim=1)
        torch.testing.assert_close(instances.pred_boxes.tensor, boxes, rtol=1e-4, atol=1e-3)


def test_score_thresh_and_detections_per_image(make_detector, make_input, perturb):
    model = perturb(make_detector()).eval()
    inputs = [make_input(64, 96)]
    everything = model(inputs)[0]["instances"]
    assert len(everything) == QUERIES * 5
    model.score_thresh = everything.scores[10].item()
    kept = model(inputs)[0]["instances"]
    assert torch.equal(kept.scores, everything.scores[:10])
    assert torch.equal(kept.pred_classes, everything.pred_classes[:10])
    model.detections_per_image = 4
    assert torch.equal(model(inputs)[0]["instances"].scores, everything.scores[:4])
    model.score_thresh = 1.0
    assert len(model(inputs)[0]["instances"]) == 0


@FORMS
@pytest.mark.parametrize(
    "sizes", [[(9, 200)], [(1, 200)], [(200, 1)], [(1, 1)], [(1, 200), (150, 3), (64, 64)]], ids=str
)
def test_tiny_images(make_detector, make_input, form, sizes):
    model = make_detector(form)
    inputs = [make_input(*size, objects=1) for size in sizes]
    losses = model(inputs)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for output, size in zip(model.eval()(inputs), sizes):
        assert output["instances"].image_size == size
        assert output["instances"].pred_boxes.tensor.isfinite().all()


def test_smallest_map_of_the_narrowest_model(make_detector, make_input):
    """32 channels in 32 groups on a map of one cell: a group norm over a single value."""
    model = make_detector(embed_dim=32)
    assert all(loss.isfinite() for loss in model([make_input(64, 64, objects=1)]).values())


@pytest.mark.parametrize("form", ["refine", "two_stage"])
def test_mixed_precision(make_detector, make_input, form):
    """Under autocast predictions and losses are float32, and close to those without it."""
    # Narrower images would be float32 in the backbone.
    inputs = [make_input(64, 128, objects=2), make_input(48, 64)]
    model = make_detector(form, "interleaved", "kda")
    if form == "two_stage":
        # All tokens: rounding would choose among those that score alike.
        model.queries.num_queries = 170
    expected = sum(model(inputs).values())
    dtypes = set()
    model.criterion.register_forward_pre_hook(
        lambda _, args: dtypes.update(t.dtype for out in args[0].values() for t in out)
    )
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(inputs)
    assert dtypes == {loss.dtype for loss in losses.values()} == {torch.float32}
    total = sum(losses.values())
    torch.testing.assert_close(total, expected, rtol=0.02, atol=0)
    total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def random_maps(height, width, dtype):
    return [
        torch.randn(1, 64, height // stride, width // stride, dtype=dtype)
        for stride in (8, 16, 32, 64)
    ]


@FORMS
@ENCODERS
@ATTENTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_padding_changes_nothing(make_detector, perturb, form, encoder, attention, dtype):
    """An image gives the same alone as beside a larger one, whatever stands in its padding."""
    # Tokens at the border propose nothing and score the same. With these weights, none is among the
    # best, where padding would decide between them.
    torch.manual_seed(2)
    model = perturb(make_detector(form, encoder, attention), std=0.05).to(dtype).eval()
    sizes = [(64, 128), (128, 192)]
    maps = [random_maps(*size, dtype) for size in sizes]
    batch = [10 * torch.randn(2, 64, *level.shape[2:], dtype=dtype) for level in maps[1]]
    for level, *images in zip(batch, *maps):
        for padded, image in zip(level, images):
            padded[:, : image.shape[2], : image.shape[3]] = image[0]
    memory, scales = encode_maps(model, batch, ImageList(torch.empty(2, 3, 128, 192), sizes))
    predictions = model.predict(memory, scales)
    assert scales.padding_mask.sum(1).tolist() == [510 - 170, 0]
    for index, (size, image_maps) in enumerate(zip(sizes, maps)):
        images = ImageList(torch.empty(1, 3, *size), [size])
        own_memory, own_scales = encode_maps(model, image_maps, images)
        assert own_scales.padding_mask is None
        valid = memory[index][~scales.padding_mask[index]]
        torch.testing.assert_close(valid, own_memory[0], rtol=0, atol=1e-5)
        own = model.predict(own_memory, own_scales)
        torch.testing.assert_close(predictions.boxes[index], own.boxes[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(predictions.logits[index], own.logits[0], rtol=0, atol=1e-5)


@FORMS
def test_forward_queries(make_detector, make_input, form):
    model = make_detector(form)
    inputs = [{"image": make_input(*size)["image"]} for size in ((64, 96), (32, 64))]
    outputs = model.forward_queries(inputs)
    assert {name: tuple(tensor.shape) for name, tensor in outputs.items()} == {
        "pred_logits": (2, QUERIES, 5),
        "pred_boxes": (2, QUERIES, 4),
        "memory": (2, 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2, 64),
    }
    assert not any(tensor.requires_grad for tensor in outputs.values())
    assert ((outputs["pred_boxes"] >= 0) & (outputs["pred_boxes"] <= 1)).all()


def test_forward_queries_is_inference_in_either_mode(make_detector, make_input):
    model = make_detector()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    inputs = [make_input(64, 96)]
    outputs = [model.train(mode).forward_queries(inputs) for mode in (True, True, False)]
    for name, tensor in outputs[0].items():
        assert torch.equal(tensor, outputs[1][name])
        assert torch.equal(tensor, outputs[2][name])


def modes(model):
    return {module.training for module in model.modules()}


@pytest.mark.parametrize("mode", [True, False])
def test_forward_queries_restores_the_mode(make_detector, make_input, mode):
    model = make_detector().train(mode)
    model.forward_queries([make_input(64, 64)])
    assert modes(model) == {mode}


def test_forward_queries_restores_the_mode_after_an_error(make_detector):
    model = make_detector().train()
    with pytest.raises(ValueError):
        model.forward_queries([{"image": torch.zeros(5, 64, 64)}])
    assert modes(model) == {True}


def test_preprocess_normalises_and_pads(make_detector):
    model = make_detector(pixel_mean=(10.0, 20.0, 30.0), pixel_std=(1.0, 2.0, 4.0))
    ramp = torch.arange(3 * 2 * 4, dtype=torch.uint8).view(3, 2, 4)
    images = model.preprocess_images([{"image": ramp}, {"image": ramp[:, :1, :3]}])
    assert images.image_sizes == [(2, 4), (1, 3)]
    expected = torch.zeros(2, 3, 2, 4)
    for channel, (mean, std) in enumerate(((10, 1), (20, 2), (30, 4))):
        for row in range(2):
            for column in range(4):
                pixel = (channel * 8 + row * 4 + column - mean) / std
                expected[0, channel, row, column] = pixel
                expected[1, channel, row, column] = pixel if row < 1 and column < 3 else 0
    torch.testing.assert_close(images.tensor, expected)


def test_padding_constraints_of_the_backbone_are_kept(make_detector, make_input):
    model = make_detector()
    type(model.backbone).padding_constraints = {"square_size": 128}
    try:
        images = model.preprocess_images([make_input(64, 96)])
    finally:
        del type(model.backbone).padding_constraints
    assert images.tensor.shape == (1, 3, 128, 128)
    _, scales = model.encode(images)
    expected = torch.tensor([0.75, 0.5]).expand(1, 3, 2)
    torch.testing.assert_close(scales.valid_ratios[:, :3], expected)


def test_padding_mask():
    images = ImageList(torch.empty(2, 3, 2, 3), [(2, 3), (1, 2)])
    mask, padded = padding_mask(images)
    assert mask.int().tolist() == [[[0, 0, 0]] * 2, [[0, 0, 1], [1, 1, 1]]]
    assert padded is True
    mask, padded = padding_mask(ImageList(torch.empty(2, 3, 2, 3), [(2, 3), (2, 3)]))
    assert not mask.any()
    assert padded is False


def test_level_embedding_tells_the_scales_apart(make_detector, make_input):
    model = make_detector()
    positions = []
    model.encoder.register_forward_pre_hook(lambda _, args: positions.append(args[1]))
    images = model.preprocess_images([make_input(64, 64)])
    model.encode(images)
    with torch.no_grad():
        model.level_embed += torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]
    model.encode(images)
    steps = [1.0] * 64 + [2.0] * 16 + [3.0] * 4 + [4.0]
    expected = torch.tensor(steps)[:, None].expand(-1, 64)
    torch.testing.assert_close((positions[1] - positions[0])[0], expected)


def test_training_needs_instances(make_detector, make_input):
    with pytest.raises(ValueError, match="instances.*gt_boxes and gt_classes.*eval()"):
        make_detector()([make_input(64, 64, 1), {"image": torch.zeros(3, 64, 64)}])


def test_an_attention_for_another_number_of_scales_is_named():
    config = small_config("two_stage", num_levels=5)
    config.encoder.layer.attention.num_levels = 4
    problem = r"encoder.layers.0.self_attn is built for 4 scales.*num_levels 5: make them agree"
    with pytest.raises(ValueError, match=problem):
        instantiate(config)


def test_registered_with_detectron2():
    assert META_ARCH_REGISTRY.get("DeformableDETR") is DeformableDETR


def test_resnet_18_of_detectron2(make_detector, make_input):
    backbone = ResNet(
        BasicStem(3, 64, norm="BN"),
        ResNet.make_default_stages(depth=18, norm="BN"),
        out_features=["res2", "res3", "res4", "res5"],
    )
    model = make_detector(backbone=backbone)
    assert model.neck.in_features == ["res3", "res4", "res5"]
    sum(model([make_input(64, 64, 1), make_input(64, 96, 1)]).values()).backward()
    assert backbone.stem.conv1.weight.grad.any()
