"""The training loader, in which another image takes the place of an unusable one."""

from itertools import islice

import pytest
import torch
from coco_datasets import error_of
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from PIL import Image
from torch.utils.data import IterableDataset

from lite_detr.data.image_files import ImageError
from lite_detr.data.train_loader import ReplacingDataset, build_train_loader


class Mapper:
    """Gives records with an image, except for the broken ones."""

    def __init__(self, broken=()):
        self.broken = set(broken)
        self.asked = []

    def __call__(self, record):
        self.asked.append(record["image_id"])
        if record["image_id"] in self.broken:
            raise ImageError("unreadable image", f"{record['image_id']} is broken")
        return record | {"image": torch.full((3, 2, 2), record["image_id"])}


def make_records(count, num_wide=None):
    num_wide = count if num_wide is None else num_wide
    return [
        {
            "image_id": i,
            "file_name": f"{i}.jpg",
            "width": 9 if i < num_wide else 5,
            "height": 6,
            "annotations": [{"bbox": [0, 0, 2, 2], "bbox_mode": 1, "category_id": 0}],
        }
        for i in range(count)
    ]


def build(mapper, count=20, batch=2, **options):
    return build_train_loader(make_records(count), mapper=mapper, total_batch_size=batch, **options)


def test_a_usable_image_comes_as_the_mapper_gives_it():
    mapper = Mapper()
    assert ReplacingDataset(make_records(3), mapper)[1]["image_id"] == 1
    assert "skipped" not in ReplacingDataset(make_records(3), mapper)[2]
    assert mapper.asked == [1, 2]


def test_a_replacement_depends_on_the_index_alone():
    broken = [3, 4, 5]
    first = ReplacingDataset(make_records(60), Mapper(broken))
    taken = {i: first[i]["image_id"] for i in range(60)}
    second = ReplacingDataset(make_records(60), Mapper(broken))
    assert {i: second[i]["image_id"] for i in reversed(range(60))} == taken
    # Not the same one for all, which would be seen more often.
    assert len({taken[i] for i in broken}) == 3 and not set(broken) & set(taken.values())
    assert all(taken[i] == i for i in range(60) if i not in broken)


def test_a_replacement_has_the_orientation_of_the_unusable_image():
    dataset = ReplacingDataset(make_records(60, num_wide=50), Mapper([0, 55]))
    assert dataset[0]["image_id"] < 50 <= dataset[55]["image_id"]


def test_without_another_of_its_orientation_the_sample_keeps_its_shape_for_grouping():
    sample = ReplacingDataset(make_records(20, num_wide=19), Mapper([19]))[19]
    assert sample["image_id"] < 19 and (sample["width"], sample["height"]) == (5, 6)
    assert sample["skipped"] == [(19, "19.jpg", "unreadable image: 19 is broken")]


def test_a_search_ends_where_too_many_are_unusable():
    mapper = Mapper(range(100))
    sample = ReplacingDataset(make_records(100), mapper, max_unusable=0.1)[50]
    assert len(mapper.asked) == len(sample["skipped"]) == 11 and "image" not in sample


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("grouping", [True, False])
def test_each_unusable_image_is_named_once_and_counted(num_workers, grouping, warnings):
    loader = build(Mapper([7, 11]), num_workers=num_workers, aspect_ratio_grouping=grouping)
    with EventStorage() as storage:
        samples = [sample for batch in islice(loader, 30) for sample in batch]
    assert sorted(loader.unusable) == [7, 11]
    assert storage.latest()["unusable_images"][0] == 2
    assert sorted(text.split(":")[0] for text in warnings) == ["11.jpg", "7.jpg"]
    assert "(2 unusable of 20 so far)" in warnings[1]
    assert not any("skipped" in sample for sample in samples)
    assert not {7, 11} & {sample["image_id"] for sample in samples}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("count", [1, 9, 40])
def test_training_stops_with_a_list_where_no_image_can_be_used(num_workers, count):
    loader = build(Mapper(range(count)), count=count, num_workers=num_workers)
    message = error_of(lambda: list(islice(loader, 1)))
    assert f"of the {count} training images are unusable so far, accepted are 10%" in message
    assert ".jpg: unreadable image: " in message.split("found so far:\n")[1]
    assert "check_dataset.py" in message and "max_unusable" in message


def test_a_tenth_is_accepted_and_more_is_not():
    list(islice(build(Mapper([1, 2])), 30))
    error_of(lambda: list(islice(build(Mapper([1, 2, 3])), 30)))
    list(islice(build(Mapper([1, 2, 3]), max_unusable=0.15), 30))


def test_even_where_all_may_be_unusable_one_has_to_be_usable():
    assert list(islice(build(Mapper(range(1, 20)), max_unusable=1.0), 10))
    error_of(lambda: list(islice(build(Mapper(range(20)), max_unusable=1.0), 1)))


def test_a_batch_is_collated_behind_the_count():
    loader = build(Mapper([3]), collate_fn=len)
    assert list(islice(loader, 20)) == [2] * 20 and list(loader.unusable) == [3]


def test_errors_of_other_kinds_are_raised():
    def mapper(record):
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        list(islice(build(mapper), 1))


def test_an_iterable_dataset_is_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            yield {}

    with pytest.raises(TypeError, match="Endless, which is iterable-style"):
        build_train_loader(Endless(), mapper=Mapper(), total_batch_size=1)


def test_boxes_that_detectron2_leaves_out_are_counted_and_their_files_named(warnings):
    records = make_records(20)
    for i, (mode, box) in enumerate(
        [
            (BoxMode.XYWH_ABS, [1, 1, 3, 3]),
            (BoxMode.XYWH_ABS, [1, 1, 0, 3]),
            (BoxMode.XYXY_ABS, [1, 1, 3, 3]),
            (BoxMode.XYXY_ABS, [3, 1, 3, 3]),
            (BoxMode.XYWH_ABS, [1, float("nan"), 3, 3]),
            (BoxMode.XYWH_ABS, [9, 1, 3, 3]),
        ]
    ):
        records[i]["annotations"] = [{"bbox": box, "bbox_mode": mode, "category_id": 0}] * 2
    build_train_loader(records, mapper=Mapper(), total_batch_size=2)
    (message,) = warnings
    assert message.startswith("8 box(es) of NaN, or without an area inside their image")
    assert message.endswith("in 1.jpg, 3.jpg, 4.jpg, 5.jpg")


def test_a_yaml_config_gives_the_same_loader(tmp_path):
    for name in ("0.jpg", "1.jpg"):
        Image.new("RGB", (30, 20)).save(tmp_path / name)
    (tmp_path / "1.jpg").write_bytes(b"")
    records = [
        record | {"width": 30, "height": 20, "file_name": str(tmp_path / f"{i % 10 == 3:d}.jpg")}
        for i, record in enumerate(make_records(10))
    ]
    DatasetCatalog.register("ten", lambda: records)
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("ten",)
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = 0, False
    cfg.SOLVER.IMS_PER_BATCH, cfg.INPUT.MIN_SIZE_TRAIN = 2, (20,)
    loader = build_train_loader(cfg)
    samples = [sample for batch in islice(loader, 10) for sample in batch]
    assert list(loader.unusable) == [3] and 3 not in {s["image_id"] for s in samples}
    loader = build_train_loader(cfg, mapper=Mapper([5]))
    list(islice(loader, 10))
    assert list(loader.unusable) == [5]
