"""Datasets that a config names: those of functions, several test sets, and their evaluators."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_datasets import error_of
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from detectron2.structures import Boxes, BoxMode, Instances
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import Dataset

from lite_detr.commands.check_data import main as check_data
from lite_detr.data.catalog import check_registered, class_metadata, split_test_sets
from lite_detr.data.coco import register_coco
from lite_detr.data.evaluator import DetectionEvaluator
from lite_detr.errors import DatasetError

EVALUATOR = "lite_detr.data.evaluator.DetectionEvaluator"


@pytest.fixture
def records(images):
    box = {"bbox": [10, 10, 30, 40], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    return [
        {
            "file_name": str(images / name),
            "image_id": f"image {number}",
            "height": 80,
            "width": 100,
            "annotations": [copy.deepcopy(box)],
        }
        for number, name in enumerate(("a.jpg", "sub/b.jpg"))
    ]


@pytest.fixture
def register(records, cfg):
    """Registers the records as a function's, and makes a config that names them."""

    def register_function(name="mine", classes=("cat", "dog"), given=None):
        DatasetCatalog.register(name, lambda: copy.deepcopy(records if given is None else given))
        if classes:
            MetadataCatalog.get(name).thing_classes = list(classes)
        for split in ("train", "test"):
            cfg.dataloader[split].dataset.names = name
        cfg.model.num_classes = 2
        return cfg

    return register_function


class TestFunctions:
    def test_a_sound_one_passes_with_or_without_names(self, register):
        check_registered(register())
        check_registered(register("numbers", classes=()))

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            (lambda r: r.clear(), "has no images: its function returned an empty list"),
            (lambda r: r.append("x"), "record 2 must be a dict with a 'file_name', but is 'x'"),
            (lambda r: r[0].pop("file_name"), "record 0 must be a dict with a 'file_name'"),
            (lambda r: r[1].update(file_name="gone.jpg"), "1 of 2 image files not found: gone.jpg"),
            (lambda r: r[1].pop("image_id"), "record 1 must have a number or a string as 'imag"),
            (lambda r: r[1].update(image_id="image 0"), "each id in 'images' must occur once"),
            (lambda r: r[1].update(width=0), "must have a positive 'width' and 'height'"),
            (lambda r: r[0]["annotations"][0].pop("bbox"), "an object without a box of four fin"),
            (lambda r: r[0]["annotations"][0].pop("bbox_mode"), "without a box of four finite"),
            (lambda r: r[0]["annotations"][0].update(bbox_mode=4), "without a box of four finite"),
            (lambda r: r[0]["annotations"][0].update(bbox=[1, 2, 3]), "without a box of four"),
            (lambda r: r[0]["annotations"][0].update(category_id=2), "has category_id 2, which"),
            (lambda r: r[0]["annotations"][0].update(category_id=-1), "has an object with -1 as"),
            (lambda r: r[0]["annotations"][0].update(category_id="a"), "has an object with 'a' as"),
        ],
    )
    def test_what_would_end_in_a_traceback_is_refused(self, change, problem, register, records):
        change(records)
        assert problem in error_of(check_registered, register())

    def test_numbers_of_numpy_and_a_missing_size_are_taken(self, register, records):
        records[0] |= {"image_id": np.int64(5)}
        records[0]["annotations"][0] |= {"category_id": np.int64(0)}
        records[0]["annotations"][0]["bbox"] = np.array([1, 2, 9, 9.5])
        for key in ("width", "height"):
            del records[1][key]
        check_registered(register())

    def test_classes_beyond_those_of_the_model(self, register, records):
        records[0]["annotations"][0]["category_id"] = 7
        cfg = register(classes=())
        assert "objects of class 7, but model.num_classes is 2" in error_of(check_registered, cfg)

    def test_nothing_to_train_on(self, register, records):
        for record in records:
            record["annotations"][0]["iscrowd"] = 1
        message = error_of(check_registered, register())
        assert (
            "dataloader.train.dataset.names=mine: none of the annotations is an object" in message
        )

    def test_an_image_id_is_asked_for_in_evaluation_alone(self, register, records):
        for record in records:
            del record["image_id"]
        cfg = register()
        check_registered(cfg, splits=("train",))
        assert "'image_id'" in error_of(check_registered, cfg, splits=("test",))

    def test_a_function_that_finds_no_file(self, register):
        cfg = register()
        DatasetCatalog["mine"] = Path("nowhere.txt").read_text
        with pytest.raises(DatasetError, match=r"'mine' cannot be loaded: \[Errno 2\]"):
            check_registered(cfg)

    def test_a_pytorch_dataset_is_left_to_detectron2(self, register):
        class Records(Dataset):
            def __len__(self):
                return 1

            def __getitem__(self, index):
                pytest.fail("was read")

        check_registered(register(given=Records()), splits=("train",))


def test_pascal_voc_is_checked_and_evaluated(tmp_path, cfg):
    """As Detectron2 registers it: its annotations are files of XML, read by a function."""
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (tmp_path / "VOC" / folder).mkdir(parents=True)
    (tmp_path / "VOC/ImageSets/Main/val.txt").write_text("000001\n000002\n")
    sizes = "<size><width>100</width><height>80</height></size>"
    corners = "<xmin>11</xmin><ymin>21</ymin><xmax>50</xmax><ymax>60</ymax>"
    named = f"<object><name>dog</name><bndbox>{corners}</bndbox></object>"
    xml = f"<annotation>{sizes}{named}</annotation>"
    for number in ("000001", "000002"):
        Image.new("RGB", (100, 80)).save(tmp_path / f"VOC/JPEGImages/{number}.jpg")
        (tmp_path / f"VOC/Annotations/{number}.xml").write_text(xml)
    register_pascal_voc("tiny_voc", str(tmp_path / "VOC"), "val", 2012, ["cat", "dog"])
    MetadataCatalog.get("tiny_voc").evaluator_type = "pascal_voc"
    for split in ("train", "test"):
        cfg.dataloader[split].dataset.names = "tiny_voc"
    cfg.model.num_classes = 2
    check_registered(cfg)
    evaluator = DetectionEvaluator("tiny_voc", distributed=False)
    evaluator.reset()
    for record in DatasetCatalog.get("tiny_voc"):
        evaluator.process([record], [{"instances": found_objects(record)}])
    assert evaluator.evaluate()["bbox"]["AP-dog"] == pytest.approx(100)


def found_objects(record):
    objects = record["annotations"]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    return Instances(
        (record["height"], record["width"]),
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.ones(len(objects)),
        pred_classes=torch.tensor([a["category_id"] for a in objects]),
    )


class TestFilesOfTheCatalog:
    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"keypoints": "x"}, "has a 'segmentation' or 'keypoints' that Detectron2 cannot read"),
            ({"segmentation": {"size": 5, "counts": [1]}}, "has a 'segmentation' or 'keypoints'"),
            ({"bbox": [1, 2, 3]}, "must have a 'bbox' of four finite numbers"),
        ],
    )
    def test_what_detectron2_fails_on(self, change, problem, content, write, images, cfg):
        content["annotations"][0] |= change
        register_coco_instances("plain", {}, str(write(content)), str(images))
        for split in ("train", "test"):
            cfg.dataloader[split].dataset.names = "plain"
        cfg.model.num_classes = 2
        assert problem in error_of(check_registered, cfg)

    def test_a_set_that_detectron2_empties(self, content, write, images, cfg):
        for annotation in content["annotations"]:
            annotation["segmentation"] = [[]]
        register_coco_instances("plain", {}, str(write(content)), str(images))
        cfg.dataloader.train.dataset.names = "plain"
        cfg.model.num_classes = 2
        message = error_of(check_registered, cfg, splits=("train",))
        assert "names=plain: none of the annotations is an object" in message

    def test_lvis_needs_its_own_evaluator(self, cfg, content, write, images):
        register_coco_instances("lvis_like", {}, str(write(content)), str(images))
        MetadataCatalog.get("lvis_like").evaluator_type = "coco"
        MetadataCatalog.pop("lvis_like")
        MetadataCatalog.get("lvis_like").set(
            evaluator_type="lvis", thing_classes=["cat", "dog"], json_file=str(write(content))
        )
        cfg.dataloader.test.dataset.names = "lvis_like"
        cfg.model.num_classes = 2
        message = error_of(check_registered, cfg, splits=("test",))
        assert (
            "dataloader.evaluator._target_=lite_detr.data.evaluator.LVISDetectionEvaluator"
            in message
        )
        evaluator = "lite_detr.data.evaluator.LVISDetectionEvaluator"
        cfg.dataloader.evaluator._target_ = evaluator
        check_registered(cfg, splits=("test",))


class TestTestSets:
    @pytest.fixture
    def two(self, content, write, images, cfg):
        for name in ("a_val", "b_val"):
            register_coco(name, write(content, f"{name}.json"), images, for_evaluation=True)
        cfg.dataloader.train.dataset.names = "a_val"
        cfg.dataloader.test.dataset.names = ["a_val", "b_val", "a_val"]
        cfg.model.num_classes = 2
        return cfg

    def test_each_has_its_loader_and_the_evaluator(self, two):
        sets = split_test_sets(two)
        assert list(sets) == ["a_val", "b_val"]
        for name, (loader, evaluator) in sets.items():
            assert loader.dataset.names == name and evaluator.dataset_name == name
        check_registered(two)
        assert two.dataloader.test.dataset.names[1] == "b_val"
        assert class_metadata(two) is MetadataCatalog.get("a_val")

    def test_a_list_of_evaluators(self, two):
        listed = [{"_target_": EVALUATOR, "dataset_name": name} for name in ("a_val", "b_val")]
        two.dataloader.evaluator = OmegaConf.create(listed)
        sets = split_test_sets(two)
        assert [evaluator.dataset_name for _, evaluator in sets.values()] == ["a_val", "b_val"]
        two.dataloader.evaluator = OmegaConf.create(listed[:1])
        assert "lists 1 evaluators for the 2 sets" in error_of(check_registered, two)
        two.dataloader.evaluator = OmegaConf.create(listed[::-1])
        message = error_of(check_registered, two)
        assert "evaluator of test set 'a_val' has dataset_name='b_val'" in message

    def test_an_evaluator_of_one_of_them(self, two):
        two.dataloader.evaluator.dataset_name = "a_val"
        message = error_of(check_registered, two)
        assert "evaluator of test set 'b_val' has dataset_name='a_val'" in message
        assert "${..test.dataset.names}" in message

    def test_other_classes_in_one_of_them(self, two, content, write, images):
        for category, name in zip(content["categories"], ("cat", "dog")):
            category["name"] = name
        register_coco("b_val", write(content, "b_val.json"), images)
        message = error_of(check_registered, two)
        assert "'a_val' and 'b_val' must have the same classes in the same order, but class 0" in (
            message
        )


def test_an_edited_dataset_is_evaluated_as_it_is_now(register, records):
    """Detectron2 keeps the COCO form of a function's dataset in a file, and trusts it."""
    register()
    for number in (1, 2):
        evaluator = DetectionEvaluator("mine", distributed=False)
        evaluator.reset()
        for record in DatasetCatalog.get("mine"):
            record["annotations"] = record["annotations"][:1]
            evaluator.process([record], [{"instances": found_objects(record)}])
        result = evaluator.evaluate()["bbox"]
        assert result["AP-dog"] == pytest.approx(100 if number == 1 else 50, abs=1)
        missed = copy.deepcopy(records[0]["annotations"][0]) | {"bbox": [60, 50, 30, 20]}
        for record in records:
            record["annotations"].append(missed)


def test_a_report_on_datasets_of_functions(register, capsys, tmp_path, records):
    register()
    for record in records:
        Image.new("RGB", (100, 80)).save(record["file_name"])
    report = tmp_path / "report.json"
    names = [f"dataloader.{split}.dataset.names=mine" for split in ("train", "test")]
    options = [*names, "model.num_classes=2", "--workers=1", f"--json={report}"]
    assert check_data(options) == 0
    assert "train (mine): dataset 'mine'\n" in capsys.readouterr().out
    found = json.loads(report.read_text())["test (mine)"]
    assert found["summary"]["objects_by_class"] == {"cat": 0, "dog": 2}
    records[1]["annotations"][0]["bbox"] = "x"
    assert check_data(options) == 1
    assert "record 1 has an object without a box" in capsys.readouterr().out
