"""Test-time augmentation, with a stub that finds a bright rectangle, and with a small detector."""

import pytest
import torch
from detectron2.modeling import DatasetMapperTTA, GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, Instances
from omegaconf import OmegaConf
from small_detectors import small_detector
from torch import nn

from lite_detr import model_zoo
from lite_detr.errors import ConfigError
from lite_detr.inference.tta import DetectorWithTTA, add_tta, fuse_boxes, refuse_tta


def fuse(*views, **options):
    """Fuse views, which list (box, score, class), and return such a list."""
    boxes, scores, classes = (
        [torch.tensor([found[part] for found in view]).reshape(-1, *shape) for view in views]
        for part, shape in enumerate(((4,), (), ()))
    )
    fused = fuse_boxes([view.float() for view in boxes], scores, classes, **options)
    return list(zip(*(values.tolist() for values in fused)))


def test_boxes_are_weighted_by_their_scores_and_a_view_without_one_counts_as_zero():
    views = [([0.0, 0, 10, 10], 0.9, 3)], [([2.0, 0, 12, 10], 0.3, 3)], []
    [(box, score, kind)] = fuse(*views)
    assert box == pytest.approx([0.5, 0, 10.5, 10])
    assert score == pytest.approx(0.4) and kind == 3


def test_objects_that_one_view_tells_apart_stay_apart():
    """Both boxes overlap by two thirds, in each view."""
    pair = [([0.0, 0, 10, 10], 0.9, 0), ([2.0, 0, 12, 10], 0.8, 0)]
    found = fuse(pair, pair)
    assert [box[0] for box, *_ in found] == [0, 2]
    assert [score for _, score, _ in found] == pytest.approx([0.9, 0.8])


def test_a_second_box_on_the_same_object_is_dropped():
    same = [([0.0, 0, 10, 10], 0.9, 0), ([0.5, 0, 10.5, 10], 0.8, 0), ([0.5, 0, 10.5, 10], 0.7, 1)]
    assert [(round(score, 6), kind) for _, score, kind in fuse(same)] == [(0.9, 0), (0.7, 1)]
    assert [score for _, score, _ in fuse(same, same)] == pytest.approx([0.9, 0.7])


def test_a_box_joins_the_group_of_its_class_that_it_overlaps_most():
    near, far, other = [0.0, 0, 10, 10], [3.0, 0, 13, 10], [1.0, 0, 11, 10]
    found = fuse([(near, 0.9, 0), (far, 0.8, 0), (other, 0.95, 1)], [(other, 0.5, 0)])
    assert [(kind, pytest.approx(score)) for _, score, kind in found] == [
        (0, 0.7),
        (1, 0.475),
        (0, 0.4),
    ]
    apart = fuse([(near, 0.9, 0)], [(far, 0.5, 0)])
    assert len(apart) == 2 and len(fuse([(near, 0.9, 0)], [(far, 0.5, 0)], iou_threshold=0.5)) == 1


class FindsBrightPixels(nn.Module):
    """Returns the box of the bright pixels, whose score is the image's width in thousandths."""

    def __init__(self):
        super().__init__()
        self.sizes = []
        self.score_thresh, self.detections_per_image = 0.0, 100

    def forward(self, batch):
        outputs = []
        self.sizes.append([tuple(inputs["image"].shape[1:]) for inputs in batch])
        for inputs in batch:
            _, height, width = inputs["image"].shape
            assert (inputs["height"], inputs["width"]) == (height, width)
            rows, columns = torch.nonzero(inputs["image"][0] > 127, as_tuple=True)
            corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            found = Instances((height, width))
            found.pred_boxes = Boxes(torch.tensor([corners], dtype=torch.float32))
            found.scores = torch.tensor([width / 1000])
            found.pred_classes = torch.tensor([2])
            outputs.append({"instances": found})
        return outputs


@pytest.fixture
def bright():
    """An image of a 12 x 20 rectangle, of a file that is twice as large."""
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    image[:, 30:50, 12:24] = 255
    return {"image": image, "height": 120, "width": 180}


def test_boxes_of_resized_and_mirrored_views_are_those_of_the_file(bright):
    model = FindsBrightPixels()
    tta = DetectorWithTTA(model, DatasetMapperTTA([60, 120], max_size=1000, flip=True)).eval()
    [output] = tta([bright])
    found = output["instances"]
    assert found.image_size == (120, 180) and found.pred_classes.tolist() == [2]
    assert (found.pred_boxes.tensor[0] - torch.tensor([24.0, 60, 48, 100])).abs().max() < 1
    # Mirror images share a batch, other sizes do not.
    assert model.sizes == [[(60, 90)] * 2, [(120, 180)] * 2]
    assert found.scores.tolist() == pytest.approx([0.135])


def test_an_input_need_not_say_the_size_of_its_file(bright):
    tta = DetectorWithTTA(FindsBrightPixels(), DatasetMapperTTA([120], 1000, False)).eval()
    found = tta([{"image": bright["image"]}])[0]["instances"]
    assert found.image_size == (60, 90)
    assert (found.pred_boxes.tensor[0] - torch.tensor([12.0, 30, 24, 50])).abs().max() < 1


def test_a_single_view_has_the_detectors_detections_its_limit_and_its_threshold():
    model = small_detector("dino").eval()
    image = torch.randint(0, 256, (3, 64, 96), generator=torch.manual_seed(0)).byte()
    tta = DetectorWithTTA(model, DatasetMapperTTA([64], 1000, flip=False)).eval()
    with torch.no_grad():
        expected = model([{"image": image}])[0]["instances"]
        found = tta([{"image": image}])[0]["instances"]
        model.detections_per_image, tta.mapper.min_sizes = 7, [64, 96]
        assert len(tta([{"image": image}])[0]["instances"]) == 7
        model.score_thresh = 0.2
        scores = tta([{"image": image}])[0]["instances"].scores
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    torch.testing.assert_close(found.scores, expected.scores)
    assert torch.equal(found.pred_classes, expected.pred_classes) and len(expected) > 7
    assert len(scores) == 0 or scores.min() >= 0.2


def test_what_cannot_be_augmented_is_refused(bright):
    tta = DetectorWithTTA(FindsBrightPixels(), DatasetMapperTTA([60], 1000, False))
    with pytest.raises(ConfigError, match="no losses: train the detector without it"):
        tta.train()([bright])
    for sizes in [], [60, 0]:
        with pytest.raises(ConfigError, match=r"resizes images to min_sizes \[.*give one size"):
            DetectorWithTTA(FindsBrightPixels(), DatasetMapperTTA(sizes, 1000, False))


def test_a_lazy_config_turns_it_on_and_its_views_are_made_of_the_original():
    cfg = model_zoo.get_config("digits/lite_dino_efficientnet_lite0.py")
    model = FindsBrightPixels()
    assert add_tta(cfg, model) is model and len(cfg.dataloader.test.mapper.augmentations) == 1
    refuse_tta(cfg, "export")
    cfg.dataloader.test_aug.enabled, cfg.dataloader.test_aug.iou_threshold = True, 0.7
    tta = add_tta(cfg, model)
    assert tta.model is model and tta.iou_threshold == 0.7
    assert list(tta.mapper.min_sizes) == [224, 256, 288] and not tta.mapper.flip
    assert cfg.dataloader.test.mapper.augmentations == []
    with pytest.raises(ConfigError, match="not for export: set dataloader.test_aug.enabled=False"):
        refuse_tta(cfg, "export")
    # Configs of earlier runs do not have it.
    old = OmegaConf.create({"dataloader": {"test": {}}})
    assert add_tta(old, model) is model


def test_detectron2s_programs_get_ours_for_our_detectors_alone():
    cfg = model_zoo.get_yaml_config("dino/lite_dino_r50_h3l1_2p1x3_36ep.yaml")
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = (48, 64), False
    model = small_detector("dino")
    tta = GeneralizedRCNNWithTTA(cfg, model)
    assert type(tta) is DetectorWithTTA and tta.model is model
    assert (tta.mapper.min_sizes, tta.mapper.max_size, tta.mapper.flip) == ((48, 64), 4000, False)
    own = DatasetMapperTTA([32], 100, True)
    assert GeneralizedRCNNWithTTA(cfg, model, own).mapper is own
    with pytest.raises(AssertionError, match="TTA is only supported on GeneralizedRCNN"):
        GeneralizedRCNNWithTTA(cfg, nn.Linear(1, 1))
