"""Mosaic and mixup: pictures whose boxes fit, and a stream of them that goes on exactly."""

import itertools

import numpy as np
import pytest
import torch
from coco_datasets import error_of
from detectron2.config import instantiate
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode
from PIL import Image

from lite_detr import model_zoo
from lite_detr.data.image_files import ImageError
from lite_detr.data.mapper import DetectionMapper
from lite_detr.data.mixing import MixedDataset, Mixing, MixUp, Mosaic, Picture
from lite_detr.data.train_loader import build_train_loader
from lite_detr.errors import ConfigError, DatasetError


def picture(height, width, *objects):
    """A picture of rectangles, each a class and the corners of its box; a class is a colour."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for label, (x0, y0, x1, y1) in objects:
        image[label, y0:y1, x0:x1] = 200
    boxes = torch.tensor([box for _, box in objects]).reshape(-1, 4).float()
    return Picture(image, Boxes(boxes), torch.tensor([label for label, _ in objects]).long())


def test_boxes_of_a_mosaic_surround_their_objects():
    """Each picture but the first has a class of its own: its box is where its colour is."""
    pictures = [
        picture(height, width, *((label, (10, 5, width - 10, height - 15)) for label in labels))
        for height, width, labels in [(90, 120, ()), (120, 90, [0]), (60, 140, [1]), (200, 40, [2])]
    ]
    np.random.seed(0)
    mosaic, num_boxes = Mosaic(min_visible=0.0, grey=0), 0
    for _ in range(40):
        found = mosaic(pictures)
        assert found.image.shape == pictures[0].image.shape and found.image.dtype == torch.uint8
        for label in range(3):
            rows, columns = torch.where(found.image[label] > 100)
            boxes = found.boxes.tensor[found.classes == label]
            # A sliver may be lost to a blurred edge.
            assert len(boxes) == 1 or (len(boxes) == 0 and len(set(rows.tolist())) < 3)
            for box in boxes if len(rows) else ():
                corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert (box - torch.stack(corners)).abs().max() < 1.5
                num_boxes += 1
    assert num_boxes > 100


def test_a_mosaic_drops_what_cropping_leaves_little_of():
    """Each object covers one half of an image, of which cropping leaves a part."""
    halves = picture(200, 200, (0, (0, 0, 100, 200)), (1, (100, 0, 200, 200)))
    empty = picture(200, 200)
    np.random.seed(1)
    for min_visible in (0.0, 0.25):
        mosaic = Mosaic(scale=(1.0, 1.0), min_visible=min_visible)
        areas = [
            area / 20000
            for _ in range(50)
            for area in mosaic([empty, halves, empty, empty]).boxes.area().tolist()
        ]
        assert len(areas) > 5 and min(areas) >= min_visible
        if not min_visible:
            assert min(areas) < 0.1


def test_a_point_in_a_corner_leaves_one_image():
    one, other = picture(40, 60, (1, (5, 5, 20, 20))), picture(40, 60, (2, (0, 0, 60, 40)))
    found = Mosaic(scale=(1.0, 1.0), centre=(0.0, 0.0))([other, other, other, one])
    assert torch.equal(found.image, one.image) and found.classes.tolist() == [1]
    assert torch.equal(found.boxes.tensor, one.boxes.tensor)


def test_mixup_lays_the_second_image_over_the_first():
    first, second = picture(60, 90, (0, (0, 0, 90, 60))), picture(30, 20, (1, (0, 0, 20, 30)))
    np.random.seed(0)
    found = MixUp(weight=(0.25, 0.25))([first, second])
    assert found.classes.tolist() == [0, 1]
    x0, y0, x1, y1 = map(int, found.boxes.tensor[1])
    assert (x1 - x0, y1 - y0) == (40, 60)
    expected = first.image.clone()
    expected[0, y0:y1, x0:x1], expected[1, y0:y1, x0:x1] = 50, 150
    assert torch.equal(found.image, expected)
    assert (first.image[0] == 200).all()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Seven images of noise, two of them upright, with three objects each."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    records = []
    for i in range(7):
        width, height = (30, 50) if i in (2, 5) else (60, 40)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        boxes = [[2, 2, 20, 30], [10, 5, 19, 11], [0, 0, width, height]]
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": j}
            for j, box in enumerate(boxes)
        ]
        size = {"width": width, "height": height}
        records.append(
            {"file_name": str(folder / f"{i}.png"), "image_id": i, "annotations": annotations}
            | size
        )
    return records


def build(records, num_workers=0, **options):
    np.random.seed(5)
    mapper = DetectionMapper(
        is_train=True,
        augmentations=[T.RandomFlip(), T.ResizeShortestEdge((24, 40), 64, "range")],
        image_format="RGB",
    )
    mixing = Mixing([Mosaic(), MixUp()], num_iters=12, share=0.5)
    options = {"mapper": mapper, "mixing": mixing, "total_batch_size": 2} | options
    return build_train_loader(records, num_workers=num_workers, **options)


def take(loader, count):
    """The next batches: the file, the pixels, the boxes and the classes of each sample."""
    return [
        [
            (
                sample["image_id"],
                sample["image"].tolist(),
                sample["instances"].gt_boxes.tensor.tolist(),
                sample["instances"].gt_classes.tolist(),
            )
            for sample in batch
        ]
        for batch in itertools.islice(loader, count)
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_interrupted_stream_goes_on_with_the_same_pictures_and_boxes(num_workers, records):
    whole = take(build(records), 10)
    for done in (3, 5, 7) if num_workers == 0 else (4,):
        loader = build(records, num_workers)
        assert take(loader, done) == whole[:done]
        resumed = build(records, num_workers)
        resumed.load_states([loader.state_dict()])
        assert take(resumed, 10 - done) == whole[done:]


def test_the_last_share_of_a_run_has_single_images(records):
    mixed, single = (
        take(build(records, aspect_ratio_grouping=False, mixing=mixing), 10)
        for mixing in (Mixing([Mosaic(1.0), MixUp(1.0)], num_iters=12, share=0.5), None)
    )
    assert all(one != other for one, other in zip(mixed[:6], single[:6]))
    assert mixed[6:] == single[6:]
    # The same images in the same order, and upright pictures stay upright, as they are grouped.
    for one, other in zip(itertools.chain(*mixed), itertools.chain(*single)):
        (_, *size), (_, *other_size) = np.shape(one[1]), np.shape(other[1])
        assert one[0] == other[0] and (size[0] > size[1]) == (other_size[0] > other_size[1])


def test_an_accumulated_iteration_counts_all_of_its_batches():
    assert Mixing([], num_iters=90, accumulation=4, share=1 / 3).num_batches == 120


def test_an_unusable_part_is_replaced_and_reported(records):
    class Broken(DetectionMapper):
        def __call__(self, record):
            if record["image_id"] == 4:
                raise ImageError("unreadable image", "broken")
            return super().__call__(record)

    mapper = Broken(is_train=True, augmentations=[], image_format="RGB")
    # Image 4 only comes as a part of others.
    options = {"mixing": Mixing([Mosaic(1.0)], 100, share=1.0), "sampler": [0, 1] * 20}
    loader = build(records, mapper=mapper, max_unusable=0.2, **options)
    samples = [sample for batch in itertools.islice(loader, 10) for sample in batch]
    assert list(loader.unusable) == [4] and not any("skipped" in sample for sample in samples)
    loader = build(records, mapper=mapper, max_unusable=0.1, **options)
    assert "are unusable so far" in error_of(lambda: list(itertools.islice(loader, 10)))


def test_a_dataset_of_one_image_is_refused_at_the_start(records):
    with pytest.raises(DatasetError, match=r"mixing combines several .* has 1: set it to null"):
        build(records[:1])
    assert len(MixedDataset(records[:2], [Mosaic()])) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mosaic(prob=1.5), "Mosaic has prob=1.5: accepted are numbers from 0 to 1"),
        (lambda: Mosaic(scale=(0.0, 1.0)), r"Mosaic has scale=\(0.0, 1.0\) and centre="),
        (lambda: Mosaic(centre=(0.7, 0.3)), r"centre=\(0.7, 0.3\): accepted are two rising"),
        (lambda: MixUp(weight=(0.5, 1.0)), r"MixUp has weight=\(0.5, 1.0\)"),
        (lambda: Mixing([], 10, share=-1), "mixing has share=-1"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_recipe_mixes_for_its_first_half():
    cfg = model_zoo.get_config("recipes/lite_dino_r50_640_dense_72ep.py")
    cfg.train.max_iter, cfg.train.accumulation = 50, 2
    mixing = instantiate(cfg.dataloader.train.mixing)
    assert mixing.num_batches == 50
    assert [type(part) for part in mixing.combinations] == [Mosaic, MixUp]
