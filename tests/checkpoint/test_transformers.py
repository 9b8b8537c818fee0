"""Against Deformable DETR of the transformers library, with random weights."""

import copy

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from torch import nn

from lite_detr import model_zoo
from lite_detr.checkpoint import WeightsError, convert, read_weights

transformers = pytest.importorskip("transformers", reason="needs the transformers library")

WIDTH, QUERIES, LAYERS = 64, 20, 2
FORMS = {
    "single_stage": {},
    "refine": {"with_box_refine": True},
    "two_stage": {"with_box_refine": True, "two_stage": True},
}
FORM = pytest.mark.parametrize("form", FORMS)
IMAGES = [(96, 128), (128, 96)]


def library_model(form):
    torch.manual_seed(0)
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.ResNetConfig(
            layer_type="bottleneck", out_features=["stage2", "stage3", "stage4"]
        ),
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=QUERIES,
        two_stage_num_proposals=QUERIES,
        num_labels=91,
        disable_custom_kernels=True,
        **FORMS[form],
    )
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    if form != "single_stage":
        # Untrained heads may be tied to one another; trained ones are not.
        model.class_embed = nn.ModuleList(copy.deepcopy(head) for head in model.class_embed)
        model.bbox_embed = nn.ModuleList(copy.deepcopy(head) for head in model.bbox_embed)
        model.model.decoder.bbox_embed = model.bbox_embed
        if form == "two_stage":
            model.model.decoder.class_embed = model.class_embed
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def our_model(form):
    config = LazyConfig.apply_overrides(
        model_zoo.get_config(f"deformable_detr/deformable_detr_r50_{form}_50ep.py"),
        [
            "model.num_classes=91",
            f"model.embed_dim={WIDTH}",
            f"model.encoder.num_layers={LAYERS}",
            "model.encoder.layer.attention.num_heads=4",
            "model.encoder.layer.ffn.hidden_dim=48",
            f"model.queries.num_queries={QUERIES}",
            f"model.decoder.heads.num_layers={LAYERS}",
        ],
    )
    return instantiate(config.model).eval()


@FORM
def test_outputs_agree(form, tmp_path):
    """A batch with padding; the weights go through a file as the library's hub has them."""
    library, ours = library_model(form), our_model(form)
    path = tmp_path / "pytorch_model.bin"
    torch.save(library.state_dict(), path)
    ours.load_state_dict(convert(read_weights(str(path)), ours))

    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in IMAGES]
    inputs = [{"image": image} for image in images]
    batch = ours.preprocess_images(inputs)
    mask = torch.zeros(len(images), *batch.tensor.shape[-2:], dtype=torch.long)
    for image_mask, (height, width) in zip(mask, IMAGES):
        image_mask[:height, :width] = 1
    with torch.no_grad():
        expected = library(pixel_values=batch.tensor, pixel_mask=mask)
    outputs = ours.forward_queries(inputs)
    for name, theirs in {
        "memory": expected.encoder_last_hidden_state,
        "pred_logits": expected.logits,
        "pred_boxes": expected.pred_boxes,
    }.items():
        assert theirs.std() > 1e-2
        torch.testing.assert_close(outputs[name], theirs, rtol=0, atol=1e-4)


@FORM
def test_files_of_both_formats_and_names_of_both_versions(form, tmp_path):
    """The library saves each shared tensor once, and may name modules as version 4 did."""
    library, ours = library_model(form), our_model(form)
    expected = convert(library.state_dict(), ours)
    library.save_pretrained(tmp_path)
    saved = convert(read_weights(str(tmp_path / "model.safetensors")), ours)
    older = {
        key.replace("backbone.model", "backbone.conv_encoder.model")
        .replace("mlp.fc", "fc")
        .replace("self_attn.o_proj", "self_attn.out_proj"): value
        for key, value in library.state_dict().items()
    }
    for weights in (saved, convert(older, ours)):
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_timms_names_of_the_backbone():
    """The hub's checkpoints have timm's ResNet, with torchvision's names."""
    library, ours = library_model("two_stage"), our_model("two_stage")
    expected = convert(library.state_dict(), ours)
    timm = {}
    for key, value in library.state_dict().items():
        for given, name in {
            "embedder.embedder.convolution": "conv1",
            "embedder.embedder.normalization": "bn1",
            "shortcut.convolution": "downsample.0",
            "shortcut.normalization": "downsample.1",
        }.items():
            key = key.replace(given, name)
        for stage in range(4):
            for layer in range(6):
                for conv in range(3):
                    given = f"encoder.stages.{stage}.layers.{layer}.layer.{conv}."
                    block = f"layer{stage + 1}.{layer}."
                    key = key.replace(f"{given}convolution", f"{block}conv{conv + 1}")
                    key = key.replace(f"{given}normalization", f"{block}bn{conv + 1}")
                key = key.replace(f"encoder.stages.{stage}.layers.{layer}.", block)
        timm[key] = value
    converted = convert(timm, ours)
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_a_projection_that_is_missing_is_an_error():
    weights = library_model("two_stage").state_dict()
    del weights["model.decoder.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(
        WeightsError, match=r"missing such as .*layers\.1\.self_attn\.in_proj_weight"
    ):
        convert(weights, our_model("two_stage"))
