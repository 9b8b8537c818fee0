"""detrex's and MMDetection's weights: names, constants, and what is refused."""

import copyreg
import re
import sys
import types

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling.backbone.swin import PatchMerging
from reference_checkpoints import reference_file

from lite_detr import model_zoo
from lite_detr.checkpoint import WeightsError, convert_weights, read_weights
from lite_detr.checkpoint.convert import as_tensors
from lite_detr.checkpoint.files import locate_weights
from lite_detr.checkpoint.mmdetection import SOURCES, class_names, reorder_patches
from lite_detr.checkpoint.rules import rename
from lite_detr.checkpoint.transforms import Weight

TWO_STAGE = "deformable_detr/deformable_detr_r50_two_stage_50ep.py"
DETREX_TWO_STAGE = "deformable_detr/detrex_deformable_detr_r50_two_stage_50ep.py"
DETREX_DINO = "detrex_dino_r50_4scale"
MMDET_DINO = "mmdet_dino_r50_4scale"


def build(name):
    """A config's model without memory for its weights."""
    config = model_zoo.get_config(name).model
    with torch.device("meta"):
        return instantiate(config)


@pytest.mark.parametrize(
    "golden, config, words",
    [
        (
            DETREX_DINO,
            "dino/dino_r50_4scale_12ep.py",
            ["heads 6 for 6", "temperature of 20", "detrex_dino_r50_4scale_12ep.py or"],
        ),
        pytest.param(
            MMDET_DINO,
            "dino/detrex_dino_r50_4scale_12ep.py",
            ["prediction_border 0.001, 1e-05 in their code", "dino/mmdet_dino_r50_4scale_12ep.py"],
            marks=pytest.mark.slow,
        ),
        # The same names and shapes; only a constant differs.
        (
            "detrex_deformable_detr_r50_two_stage",
            TWO_STAGE,
            ["border 0.001", f"They fit {DETREX_TWO_STAGE}"],
        ),
        ("mmdet_deformable_detr_r50_two_stage", DETREX_TWO_STAGE, [f"They fit {TWO_STAGE}"]),
    ],
)
def test_another_config_is_an_error_that_names_the_fitting_one(golden, config, words):
    with pytest.raises(WeightsError, match="do not fit the model") as error:
        convert_weights(reference_file(golden), build(config))
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_that_reads_other_images_is_refused():
    config = model_zoo.get_config(TWO_STAGE).model
    config.input_format = "BGR"
    weights = reference_file("mmdet_deformable_detr_r50_two_stage")
    with pytest.raises(WeightsError, match=r"RGB in their code and .*BGR in the model"):
        convert_weights(weights, instantiate(config))


def test_what_is_added_and_what_differs_in_the_losses_is_said():
    model = build(TWO_STAGE)
    model.criterion.weights["loss_ce"] = 3.0
    conversion = convert_weights(reference_file("mmdet_deformable_detr_r50_two_stage"), model)
    assert set(conversion.added) == {
        f"neck.{conv}.0.bias"
        for conv in ("lateral_convs.0", "lateral_convs.1", "lateral_convs.2", "extra_convs.0")
    }
    assert not any(conversion.state_dict[name].any() for name in conversion.added)
    assert "log_eps 0.0, 0.0, 1e-12 in their code" in conversion.summary()
    assert "criterion.weight_class 2.0 in their code and 3.0 in the model" in conversion.summary()


@pytest.mark.parametrize(
    "keys, reason",
    [
        (["bbox_head.reg_branches.0.0.weight", "text_feat_map.weight"], "Grounding DINO.* text"),
        (["bbox_head.reg_branches.0.0.weight", "query_map.weight"], "DDQ.* distinct queries"),
        (["bbox_head.transformer.level_embeds"], "MMDetection 2 .*MMDetection 3"),
        (["backbone.conv1.weight", "bbox_head.gfl_cls.weight"], "another detector of MMDetection"),
    ],
)
def test_other_graphs_are_refused_in_one_line(keys, reason):
    with pytest.raises(WeightsError, match=f"cannot be converted: |{reason}") as error:
        convert_weights({key: torch.zeros(1) for key in keys}, torch.nn.Identity())
    assert re.search(reason, str(error.value)) and "\n" not in str(error.value)


def test_patch_merging_of_mmdetection():
    """It unfolds patches; Detectron2 takes Microsoft's strided slices."""
    torch.manual_seed(0)
    merging = PatchMerging(6).double()
    given = {
        "norm.weight": torch.randn(24).double(),
        "norm.bias": torch.randn(24).double(),
        "reduction.weight": torch.randn(12, 24).double(),
    }
    ours = reorder_patches(
        {f"backbone.layers.0.downsample.{name}": Weight(w, (name,)) for name, w in given.items()}
    )
    merging.load_state_dict({name.split(".", 4)[-1]: w.value for name, w in ours.items()})
    tokens = torch.randn(1, 4, 8, 6).double()
    patches = torch.nn.functional.unfold(tokens.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
    normed = torch.nn.functional.layer_norm(
        patches, (24,), given["norm.weight"], given["norm.bias"]
    )
    torch.testing.assert_close(
        merging(tokens.flatten(1, 2), 4, 8), normed @ given["reduction.weight"].T
    )


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("patch_embed.projection.bias", "patch_embed.proj.bias"),
        ("stages.2.blocks.17.attn.w_msa.qkv.weight", "layers.2.blocks.17.attn.qkv.weight"),
        (
            "stages.0.blocks.1.attn.w_msa.relative_position_bias_table",
            "layers.0.blocks.1.attn.relative_position_bias_table",
        ),
        ("stages.3.blocks.0.ffn.layers.0.0.weight", "layers.3.blocks.0.mlp.fc1.weight"),
        ("stages.3.blocks.0.ffn.layers.1.bias", "layers.3.blocks.0.mlp.fc2.bias"),
        ("stages.1.downsample.reduction.weight", "layers.1.downsample.reduction.weight"),
        ("norm0.weight", "norm0.weight"),
    ],
)
def test_names_of_mmdetections_swin(theirs, ours):
    rules = next(source for source in SOURCES if source.name == "MMDetection's DINO").rules
    assert rename(f"backbone.{theirs}", rules) == f"backbone.{ours}"


def test_mmengine_keeps_the_average_under_state_dict(caplog):
    """Its hook swaps the two when it saves."""
    average, last = {"weight": torch.ones(1)}, {"module.weight": torch.zeros(1)}
    content = {"meta": {"mmengine_version": "0.10.7"}, "state_dict": average}
    with caplog.at_level("INFO", "lite_detr"):
        found, where = locate_weights(content | {"ema_state_dict": last}, "a.pth")
    assert found is average and where == "state_dict"
    assert "moving average under state_dict" in caplog.text


def test_the_names_of_the_classes_are_in_mmdetections_meta():
    content = {"meta": {"dataset_meta": {"classes": ("cat", "dog")}}}
    assert class_names(content) == ["cat", "dog"]
    assert class_names({"meta": 3}) == class_names([]) == []


def test_mmengines_log_of_losses_is_left_out(tmp_path, monkeypatch):
    """Its pickles name a class and look up methods of it; nothing is imported."""

    class HistoryBuffer:
        def mean(self):
            """Stand for a method that the pickle names."""

        def __reduce_ex__(self, protocol):
            state = {"values": np.ones(2), "methods": Method()}
            return copyreg.__newobj__, (HistoryBuffer,), state

    class Method:
        def __reduce__(self):
            return getattr, (HistoryBuffer, "mean")

    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    with monkeypatch.context() as patch:
        for parent in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, parent, types.ModuleType(parent))
        patch.setitem(sys.modules, module.__name__, module)
        path = str(tmp_path / "a.pth")
        log = {"train/loss": HistoryBuffer()}
        torch.save({"state_dict": {"weight": torch.ones(1)}, "message_hub": log}, path)
    assert read_weights(path)["weight"] == 1


@pytest.mark.parametrize("golden", [DETREX_DINO, MMDET_DINO])
def test_a_module_that_holds_model_average_and_metrics(golden, caplog):
    weights = reference_file(golden)
    given = {f"model.{key}": value for key, value in weights.items()}
    given |= {f"ema_model.module.{key}": value + 1 for key, value in weights.items()}
    with caplog.at_level("INFO", "lite_detr"):
        found = as_tensors(given | {"metric.total": torch.zeros(1)})
    assert set(found) == set(weights)
    assert all(torch.equal(found[key], value + 1) for key, value in weights.items())
    assert "the moving average under the names ema_model.*" in caplog.text


def test_a_part_that_was_compiled_alone():
    weights = reference_file(DETREX_DINO)
    compiled = {key.replace("encoder.", "encoder._orig_mod.", 1): v for key, v in weights.items()}
    assert set(as_tensors(compiled)) == set(weights)
