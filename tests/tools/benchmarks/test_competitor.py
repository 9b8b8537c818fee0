"""The competitor of the benchmark, as small as possible."""

import competitor
import pytest
import records
import torch
import turns
from detectron2.config import instantiate
from programs import TINY

from lite_detr import model_zoo

transformers = pytest.importorskip("transformers", reason="needs the transformers library")

SMALL = dict(
    d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=10,
    two_stage_num_proposals=10,
)  # fmt: skip


def small_case(task):
    return records.Case(
        subject=competitor.NAME,
        overrides=(),
        task=task,
        size=(64, 96),
        batch=2,
        dtype="float32",
        optimized="off",
        compiled=False,
        operators=competitor.OPERATORS,
        device="cpu",
        threads=1,
    )


@pytest.fixture
def small(monkeypatch):
    backbone = transformers.ResNetConfig(
        hidden_sizes=[32, 32, 32, 32], embedding_size=32, depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    build = competitor.transformers_subject
    monkeypatch.setattr(
        turns,
        "transformers_subject",
        lambda case: build(case, backbone_config=backbone, **SMALL),
    )


@pytest.mark.parametrize("task", ["inference", "training"])
def test_it_takes_turns_like_ours(small, task):
    seconds = turns.Runner(small_case(task)).turn()
    parts = {"data", "backbone", "neck", "encoder", "queries", "decoder", "other"}
    if task == "training":
        parts |= {"losses", "backward", "optimizer"}
    assert seconds.keys() == parts
    assert min(seconds.values()) > 0


def test_it_sees_the_same_images_and_objects_as_ours():
    ours = instantiate(model_zoo.get_config(str(TINY)).model)
    batch = turns.RandomBatches((64, 96), batch=2, num_classes=5, training=True).next()
    pixels = competitor._pixel_values(batch, "cpu")
    torch.testing.assert_close(pixels, ours.preprocess_images(batch).tensor)
    labels = competitor._labels(batch, "cpu")
    for label, inputs in zip(labels, batch):
        assert torch.equal(label["class_labels"], inputs["instances"].gt_classes)
        x0, y0, x1, y1 = inputs["instances"].gt_boxes.tensor[0].tolist()
        expected = [(x0 + x1) / 2 / 96, (y0 + y1) / 2 / 64, (x1 - x0) / 96, (y1 - y0) / 64]
        assert label["boxes"][0].tolist() == pytest.approx(expected)


def test_it_has_and_trains_as_many_parameters_as_our_config_of_that_name():
    theirs = competitor.transformers_subject(small_case("training")).model
    name = "deformable_detr/deformable_detr_r50_two_stage_50ep.py"
    ours = instantiate(model_zoo.get_config(name).model)
    counts = [
        [parameter.numel() for parameter in model.parameters() if parameter.requires_grad or every]
        for model in (theirs, ours)
        for every in (True, False)
    ]
    every, trained, our_every, our_trained = map(sum, counts)
    assert (every, trained) == (our_every, our_trained)
