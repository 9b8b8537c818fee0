"""Models whose sampling is replaced in place, and put back."""

import copy
import functools

import pytest
import torch
from torch import nn

from lite_detr import interop, ops
from lite_detr.errors import UnknownPartError
from lite_detr.interop import use_native_attention

SHAPES = [(4, 6), (2, 3)]


def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, locations, weights):
    """As MMCV has it."""
    starts = torch.tensor([0, *(h * w for h, w in value_spatial_shapes)]).cumsum(0)[:-1]
    shapes = torch.as_tensor(value_spatial_shapes)
    return ops.ms_deform_attn_pytorch(value, shapes, starts, locations, weights)


def renamed(function, name):
    """A function that calls itself by another name, as one of another project would."""
    function.__name__ = name
    return function


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) + 1

    return wrapper


class Attention(nn.Module):
    """Calls a global function, from a method behind a decorator."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(4, 4)

    @decorated
    def forward(self, value, locations, weights):
        return self.sample(self.projection(value), locations, weights)

    def sample(self, value, locations, weights):
        return multi_scale_deformable_attn_pytorch(value, SHAPES, locations, weights)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    locations = torch.rand(1, 5, 2, 2, 3, 2)
    return torch.randn(1, 30, 2, 4), locations, torch.rand(1, 5, 2, 2, 3)


@pytest.fixture
def sampled(monkeypatch):
    """The shapes of the values that our operator gets."""
    seen = []

    def record(value, *args):
        seen.append(tuple(value.shape))
        return ops.ms_deform_attn(value, *args)

    monkeypatch.setattr(interop.sampling, "ms_deform_attn", record)
    return seen


def test_the_model_alone_is_replaced_and_put_back(inputs, sampled):
    model, other = nn.ModuleList([Attention(), Attention()]), Attention()
    before, state = model[0](*inputs), list(model.state_dict())
    report = use_native_attention(model)
    assert [r.name for r in report.replacements] == ["0", "1"]
    assert "2 x Attention instead of" in str(report)
    assert "multi_scale_deformable_attn_pytorch: largest difference in a trial" in str(report)
    sampled.clear()
    torch.testing.assert_close(model[0](*inputs), before, rtol=0, atol=1e-5)
    assert len(sampled) == 1 and list(model.state_dict()) == state
    with torch.no_grad():
        twin = copy.deepcopy(model)
        twin[0].projection.weight.zero_()
        assert not torch.equal(twin[0](*inputs), before)
        other(*inputs)
    assert len(sampled) == 2
    report.restore()
    report.restore()
    assert torch.equal(model[0](*inputs), before) and len(sampled) == 2
    with use_native_attention(model):
        model[1](*inputs)
    model[1](*inputs)
    assert len(sampled) == 4  # the trial also


def test_compiled_code_has_our_operator(inputs):
    model, graphs = Attention(), []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    use_native_attention(model)
    torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    assert "lite_detr" in graphs[0] or ops.backend() == "pytorch"
    assert "grid_sampl" not in graphs[0] or ops.backend() == "pytorch"


def nearest(value, value_spatial_shapes, locations, weights):
    return multi_scale_deformable_attn_pytorch(
        value, value_spatial_shapes, locations.round(), weights
    )


class Holder(nn.Module):
    """Keeps its function, as D-FINE does."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.core = function
        for name, value in attributes.items():
            setattr(self, name, value)


def test_a_function_that_computes_something_else_stays():
    holder = Holder(renamed(nearest, "multi_scale_deformable_attention"))
    model = nn.Sequential(holder, Attention())
    report = use_native_attention(model)
    assert holder.core is nearest
    assert "differs from ours" in report.skipped["0"]
    assert "not 0: multi_scale_deformable_attention differs" in str(report)


def test_what_cannot_be_replaced_is_an_error_with_the_reason():
    with pytest.raises(UnknownPartError, match="of Linear was replaced, as none .* known are"):
        use_native_attention(nn.Linear(2, 2))
    attention = Attention()
    use_native_attention(attention)
    with pytest.raises(UnknownPartError, match="its sample has been replaced already"):
        use_native_attention(attention)
    # RT-DETRv2's other method.
    holder = Holder(multi_scale_deformable_attn_pytorch, method="discrete")
    with pytest.raises(UnknownPartError, match="samples the nearest cell"):
        use_native_attention(holder)


def test_a_compiled_extension_that_is_missing_cannot_be_tried():
    class MSDeformAttnFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            raise ImportError("no CUDA")

    report = use_native_attention(Holder(MSDeformAttnFunction))
    assert report.replacements[0].difference is None
    assert "not tried" in str(report)


def detector(transformers):
    backbone = transformers.ResNetConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        embedding_size=8,
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
    )
    return transformers.DeformableDetrForObjectDetection(config), 3


def segmenter(transformers):
    from transformers.models.mask2former import modeling_mask2former

    config = transformers.Mask2FormerConfig(
        feature_size=32, mask_feature_size=32, encoder_layers=2, encoder_feedforward_dim=32
    )
    config.num_attention_heads = 4
    decoder = modeling_mask2former.Mask2FormerPixelDecoder(config, feature_channels=[8, 8, 16, 16])
    return decoder, 2


@pytest.mark.parametrize("build", [detector, segmenter])
def test_models_of_transformers_keep_their_results(build, sampled):
    transformers = pytest.importorskip("transformers", reason="needs the transformers library")
    torch.manual_seed(0)
    model, attentions = build(transformers)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)

        def run():
            if build is detector:
                output = model(pixel_values=torch.ones(1, 3, 64, 96), return_dict=True)
                return output.logits, output.pred_boxes
            maps = [torch.ones(1, c, 32 // 2**i, 48 // 2**i) for i, c in enumerate([8, 8, 16, 16])]
            output = model(maps, return_dict=True)
            return output.mask_features, *output.multi_scale_features

        before = run()
        report = use_native_attention(model)
        sampled.clear()
        after = run()
    assert len(report.replacements) == len(sampled) == attentions
    for found, expected in zip(after, before, strict=True):
        assert expected.std() > 1e-2
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
