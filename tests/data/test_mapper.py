"""The mapper of the lazy configs."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg, instantiate
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from detectron2.utils.env import seed_all_rng
from PIL import Image

from lite_detr import model_zoo
from lite_detr.data.image_files import ImageError
from lite_detr.data.mapper import DetectionMapper


@pytest.fixture
def make_record(tmp_path):
    def make(width=60, height=40, boxes=((10, 10, 20, 20),), **fields):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "image.png")
        annotations = [
            {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 0}
            for box in boxes
        ]
        return {
            "file_name": str(tmp_path / "image.png"),
            "image_id": 7,
            "width": width,
            "height": height,
            "annotations": annotations,
        } | fields

    return make


@pytest.fixture
def coco():
    return model_zoo.get_config("common/data/coco.py").dataloader


@pytest.mark.parametrize("is_train", [True, False])
def test_a_sample_is_that_of_detectron2s_mapper(is_train, make_record, coco):
    split = coco.train if is_train else coco.test
    mapper = instantiate(split.mapper)
    split.mapper._target_ = DatasetMapper
    reference = instantiate(split.mapper)
    for seed in range(3):
        record = make_record(boxes=[(10, 10, 20, 20), (0, 0, 60, 40), (59, 39, 0, 0)])
        record["annotations"][1]["iscrowd"] = 1
        seed_all_rng(seed)
        given = mapper(record)
        seed_all_rng(seed)
        expected = reference(record)
        assert given.keys() == expected.keys()
        assert torch.equal(given["image"], expected["image"])
        if is_train:
            boxes = [sample["instances"].gt_boxes.tensor for sample in (given, expected)]
            assert torch.equal(*boxes) and len(boxes[0]) <= 1
        assert len(record["annotations"]) == 3


def test_a_yaml_config_makes_it_as_it_makes_detectron2s(make_record):
    cfg = get_cfg()
    cfg.INPUT.FORMAT = "RGB"
    sample = DetectionMapper(cfg, is_train=False)(make_record())
    assert torch.equal(sample["image"], DatasetMapper(cfg, is_train=False)(make_record())["image"])


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 3), (2, 1), (1, 300), (300, 1), (1, 500), (500, 1), (400, 20), (13, 260)]
)
def test_thin_and_tiny_images_pass_the_augmentations_of_coco(size, make_record, coco):
    train, test = instantiate(coco.train.mapper), instantiate(coco.test.mapper)
    width, height = size
    for seed in range(4):
        seed_all_rng(seed)
        record = make_record(width, height, [(0, 0, width, height)])
        sample = train(record)
        assert min(sample["image"].shape) > 0 and max(sample["image"].shape) <= 1333
        boxes = sample["instances"].gt_boxes
        assert len(boxes) and boxes.tensor.isfinite().all() and boxes.nonempty().all()
    assert 0 < min(test(record)["image"].shape) <= max(test(record)["image"].shape) <= 1333


def test_an_unusable_image_is_an_error_in_training(make_record, coco):
    record = make_record(width=60, height=40) | {"width": 61}
    with pytest.raises(ImageError, match="another size"):
        instantiate(coco.train.mapper)(record)


@pytest.mark.parametrize(("image_format", "channels"), [("RGB", 3), ("L", 1)])
def test_an_unusable_image_is_a_marked_black_square_in_evaluation(
    image_format, channels, make_record, coco
):
    coco.train.mapper.image_format = image_format
    record = make_record(width=60, height=40) | {"height": 41}
    sample = instantiate(coco.test.mapper)(record)
    assert sample["image"].shape == (channels, 32, 32) and not sample["image"].any()
    assert sample["unusable"].startswith("image of another size: it is 60 x 40")
    assert (sample["image_id"], sample["width"], sample["height"]) == (7, 60, 41)
    assert "annotations" not in sample and "annotations" in record


def test_an_error_of_an_augmentation_is_not_blamed_on_the_image(make_record):
    def broken(image):
        raise ValueError("a bug of the augmentation")

    mapper = DetectionMapper(is_train=True, augmentations=[], image_format="RGB")
    mapper.augmentations = broken
    with pytest.raises(ValueError, match="a bug of the augmentation") as info:
        mapper(make_record())
    assert not isinstance(info.value, ImageError)


class Recorder(T.Augmentation):
    """Keeps what it is given, and changes nothing."""

    def __init__(self):
        self.boxes, self.labels = [], []

    def get_transform(self, image, boxes, sem_seg):
        self.boxes.append(boxes)
        self.labels.append(sem_seg)
        return T.NoOpTransform()


def train_mapper(*augmentations):
    return DetectionMapper(is_train=True, augmentations=augmentations, image_format="RGB")


def test_augmentations_get_the_boxes_as_earlier_ones_left_them(make_record):
    before, after = Recorder(), Recorder()
    record = make_record(boxes=[(10, 10, 20, 20), (0, 0, 60, 40)])
    record["annotations"][1]["iscrowd"] = 1
    sample = train_mapper(before, T.CropTransform(5, 5, 40, 30), after)(record)
    assert before.boxes[0].tolist() == [[10, 10, 30, 30]]
    assert after.boxes[0].tolist() == [[5, 5, 25, 25]]
    assert sample["instances"].gt_boxes.tensor.tolist() == [[5, 5, 25, 25]]


def test_augmentations_get_the_class_of_each_pixel(make_record):
    """Of masks where there are any, and of boxes elsewhere."""
    recorder = Recorder()
    record = make_record(boxes=[(10, 10, 20, 20), (40, 10, 10, 10), (0, 0, 4, 4), (30, 30, 5, 5)])
    polygon, code, broken = record["annotations"][:3]
    polygon["segmentation"] = [[10, 10, 30, 10, 10, 30]]
    code["segmentation"] = {"size": [40, 60], "counts": [40 * 40 + 10, 10, 40 * 20 - 20]}
    broken["segmentation"], broken["category_id"] = [[]], 3
    train_mapper(T.RandomFlip(prob=1.0), recorder)(record)
    labels = recorder.labels[0][:, ::-1]
    assert labels.shape == (40, 60) and labels.dtype == np.uint8
    assert labels[12, 12] == 1 and labels[28, 28] == 255  # inside and outside of the triangle
    assert labels[12, 40] == 1 and labels[12, 42] == 255  # one column of the box
    assert (labels[:4, :4] == 3).all() and (labels[30:35, 30:35] == 1).all()
    assert set(np.unique(labels)) == {1, 3, 255}


def test_class_maps_of_files_are_taken(make_record, tmp_path):
    recorder = Recorder()
    Image.new("L", (60, 40), 9).save(tmp_path / "labels.png")
    train_mapper(recorder)(make_record(sem_seg_file_name=str(tmp_path / "labels.png")))
    assert (recorder.labels[0] == 9).all()


@pytest.mark.parametrize("boxes", [[], [(10, 10, 20, 20)], [(0, 0, 60, 40), (1, 1, 2, 2)]])
@pytest.mark.parametrize(
    "augmentation",
    [
        T.MinIoURandomCrop(min_ious=(0.1, 0.3)),
        T.RandomCrop_CategoryAreaConstraint("relative", (0.5, 0.5), 0.7),
        T.RandomCrop_CategoryAreaConstraint("relative", (0.5, 0.5), 0.7, ignored_category=255),
        T.RandomRotation([-30, 30]),
        T.FixedSizeCrop((32, 32)),
    ],
    ids=lambda augmentation: type(augmentation).__name__,
)
def test_detectron2s_augmentations_work_with_any_objects(augmentation, boxes, make_record):
    seed_all_rng(0)
    mapper = train_mapper(augmentation, T.ResizeShortestEdge((32, 48), 64))
    shapes = set()
    for _ in range(8):
        sample = mapper(make_record(boxes=boxes))
        shapes.add(sample["image"].shape)
        height, width = sample["image"].shape[1:]
        corners = sample["instances"].gt_boxes.tensor
        assert (corners >= 0).all() and (corners[:, 2::2] <= width).all()
        assert (corners[:, 1::2] <= height).all() and len(corners) <= len(boxes)
    assert len(shapes) > 1


def test_evaluation_gives_augmentations_no_truth(make_record):
    recorder = Recorder()
    mapper = DetectionMapper(is_train=False, augmentations=[recorder], image_format="RGB")
    mapper(make_record())
    assert recorder.boxes == recorder.labels == [None]


@pytest.mark.parametrize("is_train", [True, False])
def test_an_image_of_which_resizing_leaves_nothing_is_unusable(is_train, make_record):
    mapper = DetectionMapper(
        is_train=is_train, augmentations=[T.ResizeShortestEdge(64, 128)], image_format="RGB"
    )
    record = make_record(width=1, height=300, boxes=[])
    if is_train:
        with pytest.raises(ImageError, match="too thin to resize: nothing is left of one side"):
            mapper(record)
    else:
        assert mapper(record)["unusable"].startswith("image too thin to resize")


def test_other_errors_of_augmentations_are_theirs(make_record):
    class Broken(T.Augmentation):
        def get_transform(self, image):
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        train_mapper(Broken())(make_record())
