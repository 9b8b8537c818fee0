"""From the references' 91 category ids to Detectron2's 80 classes."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from reference_checkpoints import reference_file
from small_detectors import shrink

from lite_detr import model_zoo
from lite_detr.checkpoint import convert
from lite_detr.checkpoint.convert import COCO_CATEGORY_IDS, adapt_classes

FORMS = {
    "single_stage": "deformable_detr/deformable_detr_r50_single_stage_50ep.py",
    "two_stage": "deformable_detr/deformable_detr_r50_two_stage_50ep.py",
    "dino": "dino/lite_dino_r50_h3l1_2p1x3_36ep.py",
    "h_detr": "h_detr/h_detr_r50_36ep.py",
}
UNUSED_IDS = sorted(set(range(91)) - set(COCO_CATEGORY_IDS))


def small_model(form, num_classes):
    config = model_zoo.get_config(FORMS[form]).model
    config.num_classes = num_classes
    return instantiate(shrink(config))


def test_category_ids_are_those_of_detectron2():
    to_class = MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id
    assert [to_class[category] for category in COCO_CATEGORY_IDS] == list(range(80))
    assert UNUSED_IDS == [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]


@pytest.mark.parametrize("form", FORMS)
def test_the_same_detections_with_80_classes(form):
    """Boxes are equal, so the same proposals were chosen, and so are the logits of the classes."""
    torch.manual_seed(0)
    wide, narrow = small_model(form, 91), small_model(form, 80)
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        if form == "dino":
            # DINO's proposals compete with their best class, and training rules out ids unused.
            wide.queries.class_embed.bias[UNUSED_IDS] = -50.0
    narrow.load_state_dict(adapt_classes(wide.state_dict(), narrow))
    inputs = [{"image": torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)}]
    with_ids, with_classes = wide.forward_queries(inputs), narrow.forward_queries(inputs)
    assert torch.equal(with_classes["pred_boxes"], with_ids["pred_boxes"])
    torch.testing.assert_close(
        with_classes["pred_logits"], with_ids["pred_logits"][..., list(COCO_CATEGORY_IDS)]
    )
    assert with_ids["pred_boxes"].std(1).amin() > 1e-3


@pytest.mark.parametrize(
    "form, golden", [("two_stage", "deformable_detr_r50_two_stage"), ("h_detr", "h_detr_r50")]
)
def test_the_channel_of_any_object_stays_the_first(form, golden):
    given = reference_file(golden)
    rows = torch.arange(91.0)
    for prefix in ("", "transformer.decoder."):
        for head in range(7):
            given[f"{prefix}class_embed.{head}.bias"] = rows
    weights = convert(given, instantiate(model_zoo.get_config(FORMS[form]).model))
    assert weights["queries.class_embed.bias"].tolist() == list(range(80))
    assert weights["decoder.heads.class_embed.5.bias"].tolist() == list(COCO_CATEGORY_IDS)


def test_dinos_heads_and_label_embedding_are_gathered():
    given = reference_file("lite_dino_r50_h3l1_2p1x3")
    rows = torch.arange(92.0)
    given["label_enc.weight"] = rows[:, None].expand(-1, 256)
    given["transformer.enc_out_class_embed.bias"] = rows[:91]
    weights = convert(given, instantiate(model_zoo.get_config(FORMS["dino"]).model))
    assert weights["queries.class_embed.bias"].tolist() == list(COCO_CATEGORY_IDS)
    embedding = weights["denoising.label_embed.weight"][:, 0].tolist()
    assert embedding == [*COCO_CATEGORY_IDS, 91]


def test_embeddings_of_more_labels_than_classes_are_cut():
    """DINO's ``dn_labelbook_size`` may exceed the classes; the last row stays the last one."""
    given = reference_file("lite_dino_r50_h3l1_2p1x3")
    for key, value in given.items():
        if "class_embed" in key:
            given[key] = value[:80]
    given["label_enc.weight"] = torch.arange(92.0)[:, None].expand(-1, 256)
    weights = convert(given, instantiate(model_zoo.get_config(FORMS["dino"]).model))
    assert weights["denoising.label_embed.weight"][:, 0].tolist() == [*range(80), 91]
