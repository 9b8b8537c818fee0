"""The operators in ONNX, run by ONNX Runtime, against our own."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from lite_detr import ops
from lite_detr.export.onnx_operators import translations
from lite_detr.modeling.scales import sizes_to_tensor

onnxruntime = pytest.importorskip("onnxruntime")

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
