import pytest
import small_detectors
import torch
from small_detectors import TinyBackbone

from lite_detr.modeling import (
    DecoderLayer,
    DeformableDecoder,
    DeformableDETR,
    DeformableEncoder,
    EncoderLayer,
    FeedForward,
    HungarianMatcher,
    InterleavedEncoder,
    KeyAwareDeformableAttention,
    LearnedQueries,
    MultiScaleDeformableAttention,
    PredictionHeads,
    Scales,
    SetCriterion,
    SinePositionEncoding,
    TwoStageQueries,
)

ATTENTIONS = {"msda": MultiScaleDeformableAttention, "kda": KeyAwareDeformableAttention}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build_detector(
    form="two_stage",
    encoder="full",
    attention="msda",
    *,
    embed_dim=64,
    num_classes=5,
    num_queries=12,
    num_layers=2,
    **options,
):
    def sampler():
        return ATTENTIONS[attention](embed_dim, num_heads=4, num_levels=4, num_points=2)

    def ffn():
        return FeedForward(embed_dim, hidden_dim=48, dropout=0.0)

    layer = EncoderLayer(sampler(), ffn(), dropout=0.0)
    if encoder == "full":
        encoder = DeformableEncoder(layer, num_layers=2)
    else:
        encoder = InterleavedEncoder(layer, num_high_levels=3, num_blocks=1, updates_per_block=2)
    if form == "two_stage":
        queries = TwoStageQueries(embed_dim, num_classes, num_queries)
    else:
        queries = LearnedQueries(embed_dim, num_queries)
    heads = PredictionHeads(
        embed_dim,
        num_classes,
        num_layers,
        shared=form == "single_stage",
        size_bias=0.0 if form == "two_stage" else -2.0,
    )
    decoder_layer = DecoderLayer(sampler(), ffn(), dropout=0.0)
    return DeformableDETR(
        backbone=options.pop("backbone", None) or TinyBackbone(),
        embed_dim=embed_dim,
        num_classes=num_classes,
        position_encoding=SinePositionEncoding(embed_dim),
        encoder=encoder,
        queries=queries,
        decoder=DeformableDecoder(decoder_layer, heads, refine=form != "single_stage"),
        criterion=SetCriterion(HungarianMatcher()),
        **options,
    )


@pytest.fixture
def make_detector():
    """``make_detector(form, encoder, attention, **options)``: a model without dropout."""
    return build_detector


@pytest.fixture
def make_scales():
    """``make_scales(shapes, valid)``, where valid has each image's (height, width) per scale."""

    def make(shapes, valid=None, batch=1, dtype=torch.float64):
        valid = valid or [shapes] * batch
        masks = []
        for level, shape in enumerate(shapes):
            mask = torch.ones(len(valid), *shape, dtype=torch.bool)
            for image, sizes in enumerate(valid):
                height, width = sizes[level]
                mask[image, :height, :width] = False
            masks.append(mask)
        return Scales.from_masks(masks, any(bool(mask.any()) for mask in masks), dtype)

    return make


@pytest.fixture
def perturb():
    """Moves every parameter off its initial value, where many gradients and offsets are zero."""

    def move(module, std=0.1):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += std * torch.randn_like(parameter)
        return module

    return move


@pytest.fixture
def make_input():
    """``make_input(height, width, objects)``: an input with some boxes, of classes 0 to 4."""
    return small_detectors.make_input
