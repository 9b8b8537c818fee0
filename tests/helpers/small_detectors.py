"""Small detectors, inputs for them, and what the tests of every detector ask of one.

There is one way to make a detector small: :func:`shrink`, on a config of the model zoo. The configs
in ``tests/helpers/configs``, which programs load, use it as well.
"""

from unittest import mock

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, Instances
from torch import nn

from lite_detr import model_zoo
from lite_detr.modeling import (
    DeformableEncoder,
    InterleavedEncoder,
    KeyAwareDeformableAttention,
    MultiScaleDeformableAttention,
)

# The lite form of each detector.
CONFIGS = {
    "deformable_detr": "deformable_detr/lite_deformable_detr_r50_h3l1_2p1x3_50ep.py",
    "dino": "dino/lite_dino_r50_h3l1_2p1x3_36ep.py",
    "h_detr": "h_detr/lite_h_detr_r50_h3l1_2p1x3_36ep.py",
}
# The forms of Deformable DETR.
FORMS = {
    form: f"deformable_detr/deformable_detr_r50_{form}_50ep.py"
    for form in ("single_stage", "refine", "two_stage")
}
ATTENTIONS = {"msda": MultiScaleDeformableAttention, "kda": KeyAwareDeformableAttention}
CLASSES = 5
WIDTH, QUERIES = 64, 10
ONE_TO_MANY = 20


def sampled(names):
    """Parameters of a test of every config; most of other zoos, of the study and large are slow."""

    def is_slow(name):
        file = name.split("/")[1]
        variant = file.startswith(("detrex_", "mmdet_")) and not file.endswith("_improved.py")
        return variant or "_swin_l_" in file or name.startswith("study/lite_dino_")

    return [pytest.param(n, marks=pytest.mark.slow) if is_slow(n) else n for n in names]


class TinyBackbone(Backbone):
    """One strided convolution a map; sizes are rounded up, as a ResNet's are."""

    def __init__(self, channels=(6, 8, 10)):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1)
            for inputs, outputs, stride in zip((3, *channels), channels, (8, 2, 2))
        )
        self.channels = channels

    def output_shape(self):
        specs = zip(("res3", "res4", "res5"), self.channels, (8, 16, 32))
        return {name: ShapeSpec(channels=c, stride=stride) for name, c, stride in specs}

    def forward(self, images):
        features = {}
        for name, conv in zip(("res3", "res4", "res5"), self.convs):
            images = conv(images).relu()
            features[name] = images
        return features


def narrow(model, width=32):
    """Make the lazy config of a detector narrow, in place: its graph and its counts stay."""
    model.embed_dim = width
    model.encoder.layer.attention.num_heads = 4
    model.encoder.layer.ffn.hidden_dim = 48
    if "stages" in model.backbone:
        model.backbone.stages.depth = 18
        model.backbone.stages.pop("stride_in_1x1", None)  # basic blocks have no 1x1 convolution
    return model


def shrink(model, width=32):
    """Make the lazy config of a detector narrow and shallow, with few queries, in place."""
    narrow(model, width)
    if "num_blocks" in model.encoder:
        model.encoder.num_blocks = 1
    else:
        model.encoder.num_layers = 2
    model.queries.num_queries = QUERIES
    if "num_one_to_many" in model.queries:
        model.queries.num_one_to_many = ONE_TO_MANY
    if "denoising" in model:
        model.denoising.num_queries = 9
    model.decoder.heads.num_layers = 2
    return model


def small_config(name, encoder=None, attention=None, denoising=False, **changes):
    """The lazy model of a small detector with `TinyBackbone` and `CLASSES` classes.

    Args:
        name: a key of `CONFIGS` or of `FORMS`.
        encoder: ``"full"`` or ``"interleaved"``, in place of the config's.
        attention: ``"msda"`` or ``"kda"``, in place of the config's.
        denoising: of DINO; it is random.
        changes: keys of the config and their values.
    """
    model = model_zoo.get_config((CONFIGS | FORMS)[name]).model
    model.backbone = LazyCall(TinyBackbone)()
    model.num_classes = CLASSES
    model.encoder.layer.dropout = 0.0
    layer = model.encoder.layer
    if encoder == "full":
        model.encoder = LazyCall(DeformableEncoder)(layer=layer, num_layers=2)
    elif encoder == "interleaved":
        model.encoder = LazyCall(InterleavedEncoder)(
            layer=layer, num_high_levels=3, num_blocks=1, updates_per_block=2
        )
    if attention is not None:
        model.encoder.layer.attention._target_ = ATTENTIONS[attention]
    shrink(model, WIDTH)
    if name == "dino" and not denoising:
        model.denoising = None
    if name == "h_detr":
        model.one_to_many = 2
    for key, value in changes.items():
        model[key] = value
    return model


def small_detector(name, **options):
    """In float64, with the same weights every time, of which none is where it was initialised.

    Args:
        options: of `small_config`.
    """
    torch.manual_seed(0)
    model = instantiate(small_config(name, **options)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def save_constant_detector(path, **metadata):
    """Save an ONNX file in the form of tools/export.py's, which finds one object in any image."""
    import onnx

    def constant(name, values, kind):
        tensor = onnx.helper.make_tensor(name, kind, values.shape, values.flatten().tolist())
        return onnx.helper.make_node("Constant", [], [name], value=tensor)

    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            constant("boxes", torch.tensor([[[10.0, 20, 40, 50]]]), float32),
            constant("scores", torch.tensor([[0.75]]), float32),
            constant("classes", torch.tensor([[1]]), int64),
        ],
        "constant",
        [info("images", float32, [1, 3, "h", "w"]), info("image_sizes", int64, [1, 2])],
        [
            info("boxes", float32, [1, 1, 4]),
            info("scores", float32, [1, 1]),
            info("classes", int64, [1, 1]),
        ],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10
    )
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


def small_inputs(*objects, height=64, width=96):
    """For each number an image with so many objects, the same every time."""
    generator = torch.Generator().manual_seed(1)
    return [
        make_input(height, width, count, generator) | {"file_name": f"{index}.jpg"}
        for index, count in enumerate(objects)
    ]


def make_input(height, width, objects=0, generator=None):
    """An image with some boxes, of classes 0 to 4, drawn by a generator or PyTorch's own."""
    corner = torch.rand(objects, 2, generator=generator) * 0.6
    size = 0.1 + 0.3 * torch.rand(objects, 2, generator=generator)
    boxes = torch.cat([corner, corner + size], dim=1)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(boxes * torch.tensor([width, height, width, height]))
    instances.gt_classes = torch.randint(0, CLASSES, (objects,), generator=generator)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances}


def encode_maps(model, maps, images):
    """Encode an ImageList as if the neck had made these maps of it."""
    with (
        mock.patch.object(model.backbone, "forward", lambda images: None),
        mock.patch.object(model.neck, "forward", lambda features: maps),
    ):
        return model.encode(images)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model, expected, tolerance=1e-9):
    """To ``tolerance`` of each parameter's largest one."""
    found = gradients(model) if isinstance(model, torch.nn.Module) else model
    assert set(found) == set(expected) and expected
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        assert (found[name] - gradient).abs().max() <= tolerance * scale, name


def loss_names(*suffixes):
    return {f"loss_{part}{suffix}" for part in ("ce", "bbox", "giou") for suffix in suffixes}


def count(targets):
    """The number of objects, as criteria take it."""
    return torch.tensor(float(sum(len(target.labels) for target in targets)))


def record(module):
    """The outputs of every later call of a module."""
    outputs = []
    module.register_forward_hook(lambda _, args, output: outputs.append(output))
    return outputs


def assert_trains(model, batch, names):
    """Losses of every prediction, and a gradient for every parameter."""
    losses = model(batch)
    assert set(losses) == names
    assert all(loss.dim() == 0 and loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def assert_every_gradient(model):
    """A finite one for each parameter that trains."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # A parameter without one makes DistributedDataParallel wait in vain.
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def assert_infers(model, make_input, num_queries, num_classes):
    """Best first, in the coordinates asked for."""
    model.eval()
    inputs = [make_input(64, 96) | {"height": 32, "width": 480}, {"image": torch.zeros(3, 80, 64)}]
    raw = model.forward_queries(inputs)
    assert raw["pred_logits"].shape == (2, num_queries, num_classes)
    assert raw["pred_boxes"].shape == (2, num_queries, 4)
    for index, (output, size) in enumerate(zip(model(inputs), [(32, 480), (80, 64)], strict=True)):
        instances = output["instances"]
        assert instances.image_size == size
        assert set(instances.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
        scores = raw["pred_logits"][index].sigmoid()
        torch.testing.assert_close(instances.scores, scores.flatten().sort(descending=True).values)
        query = int(scores.amax(1).argmax())
        assert instances.pred_classes[0] == scores[query].argmax()
        cx, cy, w, h = raw["pred_boxes"][index, query].tolist()
        xs = [min(max(x, 0), 1) * size[1] for x in (cx - w / 2, cx + w / 2)]
        ys = [min(max(y, 0), 1) * size[0] for y in (cy - h / 2, cy + h / 2)]
        expected = torch.tensor([xs[0], ys[0], xs[1], ys[1]])
        torch.testing.assert_close(instances.pred_boxes.tensor[0], expected, rtol=1e-4, atol=1e-3)
