"""The operators in ONNX, run by ONNX Runtime, against our own."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from lite_detr import ops
from lite_detr.export import ExportableDetector, onnx_rewrites
from lite_detr.export.onnx_operators import translations
from lite_detr.export.program import pad_same, traceable_same_padding
from lite_detr.modeling.scales import sizes_to_tensor

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: E402

HEADS, CHANNELS, POINTS = 2, 8, 3


class Plain(nn.Module):
    def forward(self, query, finest, coarsest, locations, weights):
        tokens, sizes, starts = flatten_maps(finest, coarsest)
        return ops.ms_deform_attn(tokens, sizes, starts, locations, weights.softmax(-1))


class KeyAware(nn.Module):
    """Args: own_key: the keys are not the values."""

    def __init__(self, own_key):
        super().__init__()
        self.own_key = own_key

    def forward(self, query, finest, coarsest, locations, weights):
        tokens, sizes, starts = flatten_maps(finest, coarsest)
        key = tokens.flip(-1) if self.own_key else tokens
        return ops.key_aware_ms_deform_attn(query, key, tokens, sizes, starts, locations)


def flatten_maps(*maps):
    """Maps ``[B, H, W, M, D]`` -> tokens ``[B, S, M, D]``, the levels' sizes and starts."""
    sizes = sizes_to_tensor([(one.shape[1], one.shape[2]) for one in maps])
    tokens = torch.cat([one.flatten(1, 2) for one in maps], dim=1)
    return tokens, sizes, sizes.prod(1).cumsum(0) - sizes.prod(1)


def make_inputs(batch, queries, height, width):
    """With locations inside the maps, on their borders and outside."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "query": (queries, HEADS, CHANNELS),
        "finest": (height, width, HEADS, CHANNELS),
        "coarsest": (height - 2, width - 3, HEADS, CHANNELS),
        "locations": (queries, HEADS, 2, POINTS, 2),
        "weights": (queries, HEADS, 2, POINTS),
    }
    inputs = {
        name: torch.randn(batch, *shape, generator=generator) for name, shape in shapes.items()
    }
    inputs["locations"] = inputs["locations"] + 0.5
    return inputs


class Others(nn.Module):
    """What is translated in another way than PyTorch's exporter does it."""

    def forward(self, x):
        positive = x > 0
        divisible = F.pad(x, (0, -x.shape[3] % 8, 0, -x.shape[2] % 8))
        return (
            *(F.pad(x, (0, 2)), F.pad(x, (1, 0, 0, 3), value=2.0), divisible),
            pad_same(x, (3, 3), (2, 2), (1, 1)),
            *(x.amax(-1), x.flatten(2).amax(-1), x.flatten(2).amax(2, keepdim=True)),
            *(positive.all(-1), positive.all(1, keepdim=True)),
            *(x[0, 0, :2, 0].prod(0), x[:, :2].prod(1, keepdim=True)),
            *(*x.chunk(3, dim=1), *x.split(2, dim=1)),
        )


def test_operators_of_pytorch_that_are_translated_here_give_the_same(tmp_path):
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    example = torch.zeros(2, 5, 9, 11)
    program = torch.export.export(Others(), (example,), dynamic_shapes=(free,), strict=False)
    translated = torch.onnx.export(
        program, (), opset_version=18, custom_translation_table=translations(), verbose=False
    )
    kinds = {node.op_type for node in translated.model_proto.graph.node}
    assert not kinds & {"Pad", "Split", "ReduceMin", "ReduceProd"}
    path = tmp_path / "operators.onnx"
    translated.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [image] = session.get_inputs()
    for shape in ((2, 5, 9, 11), (1, 5, 8, 16), (3, 5, 7, 10)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        found, expected = session.run(None, {image.name: x.numpy()}), Others()(x)
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            torch.testing.assert_close(torch.from_numpy(one), other)


class Divisible(nn.Module):
    """Pads as an exported detector does for a backbone that wants multiples of 32."""

    backbone = SimpleNamespace(padding_constraints={}, size_divisibility=32)

    def forward(self, x):
        return ExportableDetector.pad(SimpleNamespace(detector=self), x)


def test_converters_take_padding_that_depends_on_sizes(tmp_path):
    """As backbones of timm have it, and those that want sizes of a multiple."""
    same = pytest.importorskip("timm.layers").Conv2dSame
    model = nn.Sequential(Divisible(), same(3, 4, 3, stride=2), nn.ReLU(), same(4, 4, 5, stride=2))
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with traceable_same_padding(model):
        program = torch.export.export(
            model, (torch.zeros(2, 3, 65, 97),), dynamic_shapes=(free,), strict=False
        )
    translated = torch.onnx.export(
        program,
        (),
        opset_version=18,
        custom_translation_table=translations(),
        optimize=False,
        verbose=False,
    )
    onnx_rewrites.simplify(translated.model)
    proto = translated.model_proto
    onnx_rewrites.make_convertible(proto)
    onnx.save(proto, tmp_path / "padded.onnx")
    quant_pre_process(tmp_path / "padded.onnx", tmp_path / "prepared.onnx")
    onnx.save(onnx.version_converter.convert_version(proto, 17), tmp_path / "earlier.onnx")
    for name in ("prepared", "earlier"):
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx")
        [image] = session.get_inputs()
        for shape in ((1, 3, 64, 96), (2, 3, 33, 70)):
            x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
            [found] = session.run(None, {image.name: x.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "module", [Plain(), KeyAware(False), KeyAware(True)], ids=["plain", "key_aware", "own_key"]
)
def test_gives_what_the_operator_gives_for_other_sizes(module, tmp_path):
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = dict.fromkeys(("query", "locations", "weights"), free)
    shapes |= dict.fromkeys(("finest", "coarsest"), free | {2: Dim.DYNAMIC})
    inputs = make_inputs(batch=2, queries=7, height=9, width=8)
    program = torch.export.export(module, (), inputs, dynamic_shapes=shapes, strict=False)
    path = tmp_path / "operator.onnx"
    translated = torch.onnx.export(
        program, (), opset_version=18, custom_translation_table=translations(), verbose=False
    )
    translated.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    taken = [entry.name for entry in session.get_inputs()]
    assert {node.domain for node in translated.model_proto.graph.node} == {""}
    for sizes in ((2, 7, 9, 8), (1, 4, 6, 11), (3, 20, 13, 5)):
        inputs = make_inputs(*sizes)
        [found] = session.run(None, {name: inputs[name].numpy() for name in taken})
        torch.testing.assert_close(torch.from_numpy(found), module(**inputs), atol=2e-6, rtol=1e-5)
