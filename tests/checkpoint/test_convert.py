"""Names, shapes and variants; the arithmetic is compared in test_golden.py."""

import logging
import re

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from reference_checkpoints import (
    attentions,
    levels,
    plain_attention,
    reference_file,
    with_linear,
    without,
)

from lite_detr import model_zoo
from lite_detr.checkpoint import WeightsError, convert, convert_weights
from lite_detr.checkpoint.mismatch import build_without_memory, signature_of

LITE = "dino/lite_dino_r50_h3l1_2p1x3_36ep.py"
DINO = "dino/dino_r50_4scale_36ep.py"
TWO_STAGE = "deformable_detr/deformable_detr_r50_two_stage_50ep.py"
REFINE = "deformable_detr/deformable_detr_r50_refine_50ep.py"
SINGLE_STAGE = "deformable_detr/deformable_detr_r50_single_stage_50ep.py"
HDETR = "h_detr/h_detr_r50_36ep.py"
ATTENTION = "model.encoder.layer.attention"
LOW_LEVEL_FFN = r"encoder\.layers\.{}\.(linear12|linear22|norm22)\."


def build(name, *options):
    """A config's model without memory for its weights, with the references' 91 classes."""
    config = LazyConfig.apply_overrides(
        model_zoo.get_config(name), ["model.num_classes=91", *options]
    )
    if "_swin_" in name:
        pytest.importorskip("timm")
        return instantiate(config.model)
    with torch.device("meta"):
        return instantiate(config.model)


def assert_whole(state_dict, model):
    """Every weight of the model, in its shape."""
    expected = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in state_dict.items()} == expected


def lite_dino():
    return reference_file("lite_dino_r50_h3l1_2p1x3")


def six_plus_one():
    """With one block the reference gives the light network to the last layer alone."""
    return without(lite_dino(), LOW_LEVEL_FFN.format("[13]"))


def refine():
    """Heads of their own, which the decoder refers to; otherwise as single-stage."""
    weights = reference_file("deformable_detr_r50_single_stage")
    for key in [key for key in weights if key.startswith(("class_embed", "bbox_embed"))]:
        weights[key] = weights[key] + int(re.search(r"\d", key)[0])
        if key.startswith("bbox_embed"):
            weights[f"transformer.decoder.{key}"] = weights[key]
    return weights


def key_proj(parts):
    modules = [module for part in parts for module in attentions(part, "key_proj")]
    return with_linear(lite_dino(), modules, 256)


def swin_h_detr():
    """H-DETR wraps its Swin Transformer once more than DINO does."""
    swin = reference_file("lite_dino_swin_t_h3l1_2p1x3")
    weights = without(reference_file("h_detr_r50"), r"^(backbone|input_proj)\.")
    weights |= {key: value for key, value in swin.items() if key.startswith("input_proj.")}
    return weights | {
        key.replace("backbone.0.", "backbone.0.body."): value
        for key, value in swin.items()
        if key.startswith("backbone.")
    }


# Checkpoints, and the config and options that they fit.
VARIANTS = {
    "H3L1-(2+1)x3": (lite_dino, LITE, []),
    "H3L1-(2+1)x3, 12 epochs": (lite_dino, "dino/lite_dino_r50_h3l1_2p1x3_12ep.py", []),
    "H2L2-(2+1)x3": (lite_dino, "dino/lite_dino_r50_h2l2_2p1x3_36ep.py", []),
    "H3L1-(6+1)x1": (six_plus_one, "dino/lite_dino_r50_h3l1_6p1x1_36ep.py", []),
    "plain attention": (
        lambda: plain_attention(lite_dino()),
        LITE,
        [f"{ATTENTION}._target_=lite_detr.modeling.MultiScaleDeformableAttention"],
    ),
    "key_proj": (
        lambda: key_proj(["encoder", "decoder"]),
        LITE,
        [f"{ATTENTION}.key_proj=True"],
    ),
    "DINO": (lambda: reference_file("dino_r50_4scale"), "dino/dino_r50_4scale_12ep.py", []),
    "DINO, 3 scales": (
        lambda: levels(reference_file("dino_r50_4scale"), 3, [1024, 2048]),
        "dino/dino_r50_3scale_36ep.py",
        [],
    ),
    "DINO, 5 scales": (
        lambda: levels(reference_file("dino_r50_4scale"), 5, [256, 512, 1024, 2048]),
        "dino/dino_r50_5scale_36ep.py",
        [],
    ),
    "Swin-T": (
        lambda: reference_file("lite_dino_swin_t_h3l1_2p1x3"),
        "dino/lite_dino_swin_t_h2l2_2p1x3_36ep.py",
        [],
    ),
    "single-stage": (
        lambda: reference_file("deformable_detr_r50_single_stage"),
        SINGLE_STAGE,
        [],
    ),
    "one scale": (
        lambda: levels(reference_file("deformable_detr_r50_single_stage"), 1, [2048]),
        SINGLE_STAGE,
        [
            "model.backbone.out_features=[res5]",
            "model.in_features=[res5]",
            "model.num_levels=1",
        ],
    ),
    "refinement": (refine, REFINE, []),
    "two-stage": (lambda: reference_file("deformable_detr_r50_two_stage"), TWO_STAGE, []),
    "H-DETR": (lambda: reference_file("h_detr_r50"), "h_detr/h_detr_r50_12ep.py", []),
    "H-DETR, Swin-T": (swin_h_detr, "h_detr/h_detr_swin_t_36ep.py", []),
    # H-DETR's authors also release their tricks without the one-to-many branch.
    "H-DETR without one-to-many queries": (
        lambda: reference_file("h_detr_r50") | {"query_embed.weight": torch.zeros(300, 256)},
        HDETR,
        ["model.queries.num_one_to_many=0"],
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_fit_their_configs(variant):
    make, config, options = VARIANTS[variant]
    model = build(config, *options)
    assert_whole(convert(make(), model), model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_config_is_an_error_that_names_the_fitting_one(variant):
    make, config, options = VARIANTS[variant]
    with pytest.raises(WeightsError, match="do not fit the model") as error:
        convert(make(), build(SINGLE_STAGE if config != SINGLE_STAGE else HDETR))
    text = " ".join([config, *options])
    assert text in re.split(" or |; ", str(error.value).split("They fit ")[1])


@pytest.mark.parametrize(
    "variant, wrong, words",
    [
        ("H3L1-(2+1)x3", DINO, ["encoder attention key-aware in the weights and plain in"]),
        ("DINO", LITE, ["encoder 6 layers in the weights and 3 blocks of 2 in the model"]),
        ("H3L1-(6+1)x1", LITE, ["encoder 1 blocks of 6 in the weights"]),
        ("single-stage", REFINE, ["heads 1 for 6 layers in the weights"]),
        ("refinement", SINGLE_STAGE, ["heads 6 for 6 layers in the weights"]),
        ("refinement", TWO_STAGE, ["learned queries in the weights"]),
        ("H-DETR", TWO_STAGE, ["detector H-DETR", "ffn width 2048", "queries 1800"]),
        ("Swin-T", LITE, ["backbone Swin with 2, 2, 6, 2 blocks", "lite_dino_swin_t"]),
        ("plain attention", LITE, ["encoder attention plain in the weights"]),
        ("key_proj", LITE, ["key-aware, with key_proj in the weights and key-aware in"]),
    ],
)
def test_the_error_says_in_what_weights_and_model_differ(variant, wrong, words):
    with pytest.raises(WeightsError) as error:
        convert(VARIANTS[variant][0](), build(wrong))
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_scales_that_weights_do_not_tell_are_said_to_be_untold():
    with pytest.raises(WeightsError, match="h2l2.* or .*h3l1.*which scales are high-level is not"):
        convert(lite_dino(), build(DINO))


def test_key_projections_in_the_encoder_alone_fit_no_config():
    """As the reference builds them with ``proj_key=True``."""
    weights = key_proj(["encoder"])
    with pytest.raises(WeightsError, match="No config of the model zoo fits them"):
        convert(weights, build(LITE))
    config = model_zoo.get_config(LITE).model
    config.num_classes = 91
    config.decoder.layer.attention = dict(config.encoder.layer.attention)
    config.encoder.layer.attention.key_proj = True
    with torch.device("meta"):
        model = instantiate(config)
    assert_whole(convert(weights, model), model)


def test_each_weight_goes_to_its_place():
    """By the number that fills it, for one weight of each kind."""
    given = lite_dino()
    weights = convert(given, build(LITE))
    layer = "transformer.encoder.layers.3"
    for ours, theirs in {
        "backbone.stem.conv1.weight": "backbone.0.body.conv1.weight",
        "backbone.res4.2.conv3.norm.running_var": "backbone.0.body.layer3.2.bn3.running_var",
        "backbone.res2.0.shortcut.norm.bias": "backbone.0.body.layer1.0.downsample.1.bias",
        "neck.lateral_convs.2.0.weight": "input_proj.2.0.weight",
        "neck.extra_convs.0.1.bias": "input_proj.3.1.bias",
        "encoder.layers.3.norm.weight": f"{layer}.norm1.weight",
        "encoder.layers.3.ffn.norm.weight": f"{layer}.norm2.weight",
        "encoder.low_level_ffns.1.linear1.weight": f"{layer}.linear12.weight",
        "encoder.low_level_ffns.1.linear2.bias": f"{layer}.linear22.bias",
        "encoder.low_level_ffns.1.norm.bias": f"{layer}.norm22.bias",
        "decoder.layers.5.cross_attn_norm.bias": "transformer.decoder.layers.5.norm1.bias",
        "decoder.layers.5.self_attn_norm.bias": "transformer.decoder.layers.5.norm2.bias",
        "decoder.layers.5.ffn.norm.bias": "transformer.decoder.layers.5.norm3.bias",
        "decoder.heads.bbox_embed.0.4.bias": "bbox_embed.0.layers.2.bias",
        "decoder.query_pos.mlp.2.bias": "transformer.decoder.ref_point_head.layers.1.bias",
        "queries.bbox_embed.2.bias": "transformer.enc_out_bbox_embed.layers.1.bias",
        "queries.class_embed.bias": "transformer.enc_out_class_embed.bias",
        "queries.content.weight": "transformer.tgt_embed.weight",
        "denoising.label_embed.weight": "label_enc.weight",
    }.items():
        assert torch.equal(weights[ours], given[theirs]), ours


def test_query_embeddings_are_position_and_content():
    given = reference_file("deformable_detr_r50_single_stage")
    given["query_embed.weight"] = torch.arange(300 * 512.0).view(300, 512)
    weights = convert(given, build(SINGLE_STAGE))
    assert torch.equal(weights["queries.pos.weight"], given["query_embed.weight"][:, :256])
    assert torch.equal(weights["queries.content.weight"], given["query_embed.weight"][:, 256:])


def test_the_last_pair_of_heads_makes_the_proposals():
    given = reference_file("deformable_detr_r50_two_stage")
    weights = convert(given, build(TWO_STAGE))
    assert torch.equal(weights["queries.class_embed.bias"], given["class_embed.6.bias"])
    assert torch.equal(weights["queries.bbox_embed.4.bias"], given["bbox_embed.6.layers.2.bias"])
    assert torch.equal(weights["decoder.heads.class_embed.5.bias"], given["class_embed.5.bias"])


def test_the_report_accounts_for_every_key():
    given = lite_dino() | {
        "transformer.encoder.layers.0.norm1.num_batches_tracked": torch.tensor(1)
    }
    conversion = convert_weights(given, build(LITE, "model.denoising=null"))
    keys = [key for keys in conversion.used.values() for key in keys]
    assert sorted(keys + list(conversion.ignored)) == sorted(given)
    assert set(conversion.ignored) == {
        "label_enc.weight",
        "transformer.encoder.layers.0.norm1.num_batches_tracked",
    }
    assert conversion.source == "Lite-DINO"
    assert f"{len(keys)} keys used for {len(conversion.used)} weights" in conversion.summary()
    assert "label_enc.weight (only for training with denoising" in conversion.summary()
    table = conversion.table()
    assert "label_enc.weight: omitted (only for training with denoising" in table
    assert "input_proj.3.0.weight -> neck.extra_convs.0.0.weight" in table
    assert all(key in table for key in given)


def test_a_key_left_over_is_an_error():
    extra = {"transformer.encoder.layers.0.adapter.weight": torch.zeros(3)}
    with pytest.raises(WeightsError, match=r"1 keys left over such as .*layers\.0\.adapter"):
        convert(lite_dino() | extra, build(LITE))


@pytest.mark.parametrize(
    "key, ours",
    [
        ("transformer.decoder.norm.weight", "decoder.norm.weight"),
        ("label_enc.weight", "denoising.label_embed.weight"),
        ("backbone.0.body.bn1.running_mean", "backbone.stem.conv1.norm.running_mean"),
    ],
)
def test_a_missing_key_is_an_error(key, ours):
    weights = lite_dino()
    del weights[key]
    with pytest.raises(WeightsError, match=f"1 keys missing such as {ours}"):
        convert(weights, build(LITE))


@pytest.mark.parametrize("pattern", ["class_embed", r"class_embed.*bias", "bbox_embed"])
def test_missing_heads_are_an_error(pattern):
    """And no reason to take a detector for a backbone."""
    with pytest.raises(WeightsError, match="keys missing such as .*(class|bbox)_embed"):
        convert(without(lite_dino(), pattern), build(LITE))


def test_a_shape_that_differs_is_an_error():
    weights = lite_dino() | {"transformer.decoder.norm.weight": torch.zeros(128)}
    with pytest.raises(
        WeightsError, match=r"1 of another shape .*norm\.weight, \(128,\) for \(256"
    ):
        convert(weights, build(LITE))


def test_two_keys_for_one_weight_must_agree():
    weights = reference_file("deformable_detr_r50_two_stage")
    weights["class_embed.2.bias"] = weights["class_embed.2.bias"] + 1
    with pytest.raises(WeightsError, match=r"class_embed\.2\.bias.*with different values"):
        convert(weights, build(TWO_STAGE))


def test_heads_that_differ_are_not_taken_for_shared_ones():
    weights = reference_file("dino_r50_4scale")
    for prefix in ("", "transformer.decoder."):
        weights[f"{prefix}class_embed.4.bias"] = torch.full((91,), -7.0)
    # Of detrex, with the authors' position encoding.
    fitting = "dino/detrex_dino_r50_4scale_24ep.py"
    with pytest.raises(WeightsError, match=f"heads 6 for 6 .* and 1 for 6 .*{fitting}"):
        convert(weights, build(DINO))
    model = build(DINO, "model.decoder.heads.shared=False")
    converted = convert(weights, model)
    assert_whole(converted, model)
    assert converted["decoder.heads.class_embed.4.bias"][0] == -7


@pytest.mark.parametrize("layers", ["[35]", "1", "5"])
def test_blocks_that_are_not_equal_are_an_error(layers):
    with pytest.raises(WeightsError, match="accepted is the last layer of each"):
        convert(without(lite_dino(), LOW_LEVEL_FFN.format(layers)), build(LITE))


def test_data_parallel_training_leaves_a_prefix():
    model = build(LITE)
    assert_whole(convert({f"module.{key}": v for key, v in lite_dino().items()}, model), model)


@pytest.mark.parametrize(
    "weights, words",
    [
        ({"layer": torch.zeros(1)}, ["no known implementation", "['layer']", "Lite-DINO"]),
        ([torch.zeros(1)], ["must be a dict", "got list"]),
        ({"model": {}}, ["must be a dict", "got a value of type dict for 'model'"]),
        ({}, ["no known implementation"]),
    ],
)
def test_what_is_no_checkpoint_is_an_error(weights, words):
    with pytest.raises(WeightsError) as error:
        convert(weights, build(TWO_STAGE))
    for word in words:
        assert word in str(error.value)


def test_facts_of_all_configs_differ_where_their_weights_do():
    """The suggestion rests on it: equal facts, equal names and shapes."""
    by_facts = {}
    backbones = {}
    for name in model_zoo.list_configs():
        # The signature is of detectors with several scales.
        if not name.startswith(("deformable_detr/", "dino/", "h_detr/")) or "_swin_" in name:
            continue
        config = model_zoo.get_config(name).model
        config.num_classes = 91
        model = build_without_memory(config, backbones)
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        assert by_facts.setdefault(signature_of(model), shapes) == shapes, name


def test_other_classes_keep_the_body_and_say_so(caplog):
    model = instantiate(
        LazyConfig.apply_overrides(model_zoo.get_config(DINO), ["model.num_classes=3"]).model
    )
    given = reference_file("dino_r50_4scale")
    with caplog.at_level(logging.WARNING, "lite_detr"):
        weights = convert(given, model)
    assert (
        "weights are for 91 classes, the model has 3: its class heads are re-initialised"
        in caplog.text
    )
    renewed = {name for name in weights if weights[name].equal(model.state_dict()[name])}
    classes = {name for name in weights if re.search(r"class_embed|label_embed", name)}
    assert len(classes) == 5
    assert classes <= renewed
    assert torch.equal(
        weights["queries.bbox_embed.4.bias"], given["transformer.enc_out_bbox_embed.layers.2.bias"]
    )
    assert_whole(weights, model)
