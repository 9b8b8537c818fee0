"""Registration and config wiring of COCO-format datasets."""

import contextlib
import copy
import io
import shutil

import pytest
import torch
from coco_datasets import add_boxes, error_of
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances

from lite_detr.data.coco import (
    apply_data_config,
    check_coco,
    check_registered,
    class_metadata,
    register_coco,
)


class TestRegisterCoco:
    def test_metadata(self, content, write, images):
        path = write(content)
        assert register_coco("pets", path, images) == check_coco(path, images)
        metadata = MetadataCatalog.get("pets")
        assert metadata.json_file == str(path) and metadata.image_root == str(images)
        assert metadata.evaluator_type == "coco"
        assert metadata.thing_classes == ["cat", "dog"]
        assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}

    def test_loads_good_annotations_as_they_are(self, content, write, images):
        register_coco("pets", write(content), images)
        first, second = DatasetCatalog.get("pets")
        assert first["file_name"] == str(images / "a.jpg") and first["image_id"] == 10
        assert [a["bbox"] for a in first["annotations"]] == [[10, 10.5, 20, 30], [0, 0, 100, 80]]
        assert [a["category_id"] for a in first["annotations"]] == [1, 0]
        assert {a["bbox_mode"] for a in first["annotations"]} == {BoxMode.XYWH_ABS}
        assert second["annotations"] == []

    def test_drops_and_clips(self, content, write, images):
        content["annotations"] = []
        add_boxes(
            content,
            [5, 5, 0, 9],
            [5, 5, 9, -1],
            [100, 5, 9, 9],
            [5, -9, 9, 9],
            [-200, 5, 9, 9],
            [20, 10, -5, -5],
            [95, 70, 9, 20],
            [-4, -5, 9, 9],
            [-1e308, -1e308, 1e308, 1e308],
            [-10, -10, 300, 300],
        )
        register_coco("pets", write(content), images)
        boxes = [a["bbox"] for a in DatasetCatalog.get("pets")[0]["annotations"]]
        assert boxes == [[95, 70, 5, 10], [0, 0, 5, 4], [0, 0, 100, 80]]

    def test_images_left_without_annotation_are_filtered(self, content, write, images):
        content["annotations"][1]["image_id"] = 20
        content["annotations"][1]["bbox"] = [5, 5, 0, 9]
        register_coco("pets", write(content), images)
        assert [r["image_id"] for r in get_detection_dataset_dicts("pets")] == [10]

    def test_same_paths_again(self, content, write, images):
        path = write(content)
        assert register_coco("pets", path, images) == register_coco("pets", path, images)
        assert len(DatasetCatalog.get("pets")) == 2

    def test_other_paths_replace(self, content, write, images):
        register_coco("pets", write(content), images)
        DatasetCatalog.get("pets")
        content["categories"].append({"id": 8, "name": "cow"})
        path = write(content, "more.json")
        register_coco("pets", path, images)
        assert MetadataCatalog.get("pets").json_file == str(path)
        assert MetadataCatalog.get("pets").thing_classes == ["cat", "dog", "cow"]
        assert len(DatasetCatalog.get("pets")) == 2

    def test_bad_dataset_is_not_registered(self, content, write, tmp_path):
        error_of(register_coco, "pets", write(content), tmp_path / "photos")
        assert "pets" not in DatasetCatalog

    def test_coco_evaluator(self, content, write, images, tmp_path):
        register_coco("pets", write(content), images, for_evaluation=True)
        evaluator = COCOEvaluator("pets", tasks=("bbox",), distributed=False)
        evaluator.reset()
        for record in DatasetCatalog.get("pets"):
            truth = record["annotations"]
            instances = Instances((record["height"], record["width"]))
            boxes = torch.tensor([a["bbox"] for a in truth]).reshape(-1, 4)
            instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
            instances.pred_classes = torch.tensor([a["category_id"] for a in truth]).long()
            instances.scores = torch.ones(len(truth))
            evaluator.process([record], [{"instances": instances}])
        with contextlib.redirect_stdout(io.StringIO()):
            result = evaluator.evaluate()["bbox"]
        assert result["AP"] == pytest.approx(100)
        assert {"AP-cat", "AP-dog"} <= set(result)


class TestApplyDataConfig:
    @pytest.fixture
    def paths(self, content, write, images):
        return {
            "train_json": str(write(content, "train.json")),
            "train_images": str(images),
            "val_json": str(write(content, "val.json")),
            "val_images": str(images),
        }

    def test_nothing_given(self, cfg):
        before, registered = copy.deepcopy(cfg), DatasetCatalog.list()
        apply_data_config(cfg)
        assert cfg == before and DatasetCatalog.list() == registered
        del cfg.data
        apply_data_config(cfg)

    def test_train_and_val(self, cfg, paths):
        cfg.data = paths
        apply_data_config(cfg)
        train, test = cfg.dataloader.train.dataset.names, cfg.dataloader.test.dataset.names
        assert train.startswith("train_train_") and test.startswith("val_test_")
        assert cfg.dataloader.evaluator.dataset_name == test
        assert cfg.model.num_classes == 2
        assert MetadataCatalog.get(train).json_file == paths["train_json"]
        assert MetadataCatalog.get(test).json_file == paths["val_json"]
        assert len(DatasetCatalog.get(train)) == 2
        check_registered(cfg)

    def test_names_in_weights_count_unless_paths_are_given(self, cfg, paths):
        cfg.model.num_classes = 2
        assert class_metadata(cfg, ("wolf", "lynx")).thing_classes == ["wolf", "lynx"]
        cfg.data = paths
        apply_data_config(cfg)
        assert class_metadata(cfg, ("wolf", "lynx")).thing_classes == ["cat", "dog"]

    def test_writes_no_file(self, cfg, paths, tmp_path):
        before = sorted(tmp_path.rglob("*"))
        cfg.data = paths
        apply_data_config(cfg)
        assert sorted(tmp_path.rglob("*")) == before

    def test_every_process_gets_the_same_names(self, cfg, paths):
        cfg.data = paths
        again = copy.deepcopy(cfg)
        apply_data_config(cfg)
        apply_data_config(again)
        assert cfg == again

    def test_datasets_of_the_same_file_name_do_not_collide(self, cfg, paths, content, write):
        cfg.data = paths
        other = copy.deepcopy(cfg)
        other.data.val_json = str(write(content, "other/val.json"))
        apply_data_config(cfg)
        apply_data_config(other)
        assert cfg.dataloader.test.dataset.names != other.dataloader.test.dataset.names
        assert cfg.dataloader.train.dataset.names == other.dataloader.train.dataset.names

    def test_training_and_evaluating_on_one_file(self, cfg, paths):
        cfg.data = {**paths, "val_json": paths["train_json"]}
        apply_data_config(cfg)
        assert cfg.dataloader.train.dataset.names != cfg.dataloader.test.dataset.names

    def test_only_val(self, cfg, paths):
        cfg.data.val_json, cfg.data.val_images = paths["val_json"], paths["val_images"]
        apply_data_config(cfg)
        assert cfg.dataloader.train.dataset.names == "coco_2017_train"
        assert cfg.dataloader.test.dataset.names.startswith("val_test_")
        assert cfg.model.num_classes == 2

    def test_evaluation_leaves_the_training_set_alone(self, cfg, paths, tmp_path):
        cfg.data = {**paths, "train_json": str(tmp_path / "nowhere.json")}
        apply_data_config(cfg, splits=("test",))
        assert cfg.dataloader.train.dataset.names == "coco_2017_train"
        check_registered(cfg, splits=("test",))
        assert "nowhere.json" in error_of(apply_data_config, cfg)

    @pytest.mark.parametrize(
        ("given", "missing"),
        [
            ("train_json", "train_images val_json val_images"),
            ("train_images", "train_json val_json val_images"),
            ("val_json", "val_images"),
            ("val_images", "val_json"),
            ("train_json train_images", "val_json val_images"),
            ("train_json val_json", "train_images val_images"),
            ("train_json val_images", "train_images val_json"),
            ("train_images val_json", "train_json val_images"),
            ("train_images val_images", "train_json val_json"),
            ("train_json train_images val_json", "val_images"),
            ("train_json train_images val_images", "val_json"),
            ("train_json val_json val_images", "train_images"),
            ("train_images val_json val_images", "train_json"),
        ],
    )
    def test_incomplete(self, given, missing, cfg, paths):
        for key in given.split():
            cfg.data[key] = paths[key]
        message = error_of(apply_data_config, cfg)
        keys = ", ".join(f"data.{key}" for key in missing.split())
        assert message.startswith(f"{keys} missing: given data.{given.split()[0]}")
        assert cfg.model.num_classes == 80

    def test_folder_with_a_number_as_name(self, cfg, paths, images, tmp_path, monkeypatch):
        shutil.move(images, tmp_path / "2017")
        monkeypatch.chdir(tmp_path)
        cfg.data.val_json, cfg.data.val_images = paths["val_json"], 2017
        apply_data_config(cfg)
        assert MetadataCatalog.get(cfg.dataloader.test.dataset.names).image_root == "2017"

    def test_different_categories(self, cfg, paths, content, write):
        content["categories"][0]["name"] = "wolf"
        content["categories"].append({"id": 9, "name": "cow"})
        cfg.data = {**paths, "val_json": str(write(content, "val.json"))}
        message = error_of(apply_data_config, cfg)
        assert paths["train_json"] in message and paths["val_json"] in message
        assert "only the first lists: 7 'dog'; only the second lists: 7 'wolf', 9 'cow'" in message

    def test_category_order_in_the_file_does_not_matter(self, cfg, paths, content, write):
        content["categories"].reverse()
        cfg.data = {**paths, "val_json": str(write(content, "val.json"))}
        apply_data_config(cfg)

    @pytest.mark.parametrize("change", [{"iscrowd": 1}, {"bbox": [5, 5, 0, 9]}])
    def test_training_set_without_objects(self, change, cfg, paths, content, write):
        for annotation in content["annotations"]:
            annotation |= change
        cfg.data = {**paths, "train_json": str(write(content, "train.json"))}
        message = error_of(apply_data_config, cfg)
        assert message.startswith(f"{paths['train_json']}: none of the annotations is an object")

    def test_training_set_without_annotations(self, cfg, paths, content, write):
        content["annotations"] = []
        cfg.data = {**paths, "train_json": str(write(content, "train.json"))}
        message = error_of(apply_data_config, cfg)
        assert message.startswith(f"{paths['train_json']}: 'annotations' is empty")

    def test_only_val_needs_the_fields_of_evaluation(self, cfg, paths, content, write, warnings):
        del content["annotations"][0]["area"]
        write(content, "train.json")
        cfg.data = paths
        apply_data_config(cfg)
        assert warnings == []
        write(content, "val.json")
        apply_data_config(cfg)
        (message,) = warnings
        assert paths["val_json"] in message and "annotation ids 101" in message

    def test_bad_dataset(self, cfg, paths):
        cfg.data = {**paths, "val_json": paths["val_json"] + "x"}
        assert paths["val_json"] + "x: annotation file not found" in error_of(
            apply_data_config, cfg
        )


class TestCheckRegistered:
    @pytest.fixture
    def good(self, cfg, content, write, images):
        register_coco("pets", write(content), images)
        cfg.dataloader.train.dataset.names = "pets"
        cfg.dataloader.test.dataset.names = ["pets"]
        cfg.model.num_classes = 2
        return cfg

    @pytest.fixture
    def no_builtin_data(self, monkeypatch, tmp_path):
        """A working folder without datasets/, where Detectron2 looks by default."""
        monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
        monkeypatch.chdir(tmp_path)
        for name in ("coco_2017_train", "coco_2017_val"):
            metadata = MetadataCatalog.pop(name).as_dict()
            for key in ("json_file", "image_root"):
                metadata[key] = "datasets/coco/" + metadata[key].split("coco/")[1]
            MetadataCatalog.get(name).set(**metadata)

    def test_good(self, good):
        check_registered(good)

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_unknown_name(self, split, good):
        good.dataloader[split].dataset.names = ["pets", "coco_2017_vall"]
        message = error_of(check_registered, good)
        assert f"'coco_2017_vall' (dataloader.{split}.dataset.names) is not reg" in message
        assert "coco_2017_val," in message and "register_coco(" in message
        assert "data.val_json" in message and ("data.train_json" in message) == (split == "train")

    def test_unknown_name_unlike_any_other(self, good):
        good.dataloader.test.dataset.names = "@@@@"
        assert "nearest" not in error_of(check_registered, good)

    @pytest.mark.parametrize("names", [None, []])
    def test_no_name(self, names, good):
        good.dataloader.train.dataset.names = names
        assert "dataloader.train.dataset.names is" in error_of(check_registered, good)

    def test_looks_only_at_the_given_splits(self, good):
        good.dataloader.train.dataset.names = "nowhere"
        check_registered(good, splits=("test",))
        assert "'nowhere'" in error_of(check_registered, good, splits=("train",))

    @pytest.mark.parametrize(("split", "name"), [("train", "train2017"), ("test", "val2017")])
    def test_builtin_dataset_without_files(self, split, name, cfg, no_builtin_data):
        message = error_of(check_registered, cfg, splits=(split,))
        path = f"datasets/coco/annotations/instances_{name}.json"
        assert f"dataset '{cfg.dataloader[split].dataset.names}' expects {path}: file" in message
        assert "set DETECTRON2_DATASETS to the folder that holds coco/" in message
        assert "data.val_json" in message

    def test_builtin_dataset_with_files(self, cfg, no_builtin_data, content, write, tmp_path):
        (tmp_path / "datasets/coco/annotations").mkdir(parents=True)
        write(content, "datasets/coco/annotations/instances_val2017.json")
        message = error_of(check_registered, cfg, splits=("test",))
        assert "expects datasets/coco/val2017: folder not found" in message
        (tmp_path / "datasets/coco/val2017/sub").mkdir(parents=True)
        for image in content["images"]:
            (tmp_path / "datasets/coco/val2017" / image["file_name"]).touch()
        check_registered(cfg, splits=("test",))

    def test_own_dataset_without_files(self, good, tmp_path):
        (tmp_path / "instances.json").unlink()
        message = error_of(check_registered, good)
        assert f"'pets' expects {tmp_path / 'instances.json'}: file not found" in message
        assert "DETECTRON2_DATASETS" not in message

    def test_channels_in_another_order_than_the_models(self, good):
        good.dataloader.test.mapper = {"image_format": "RGB"}
        good.model.input_format = "BGR"
        message = error_of(check_registered, good)
        assert (
            "dataloader.test.mapper.image_format is RGB, but model.input_format is BGR" in message
        )

    def test_panoptic_dataset(self, good):
        name = "coco_2017_val_panoptic_separated"
        good.dataloader.test.dataset.names = name
        message = error_of(check_registered, good)
        assert f"dataset {name!r} is for evaluation of type 'coco_panoptic_seg'" in message

    def test_masks_cannot_be_evaluated(self, good):
        good.dataloader.evaluator.tasks = ["bbox"]
        check_registered(good)
        good.dataloader.evaluator.tasks = ["bbox", "segm"]
        message = error_of(check_registered, good)
        assert "dataloader.evaluator.tasks=[bbox,segm]: the detectors find boxes" in message

    def test_number_of_classes(self, good):
        good.model.num_classes = 80
        message = error_of(check_registered, good)
        assert "'pets' has 2 classes but model.num_classes is 80" in message

    def test_number_of_classes_before_detectron2_loads_them(self, good, content, write, images):
        register_coco_instances("plain", {}, write(content, "plain.json"), images)
        good.dataloader.test.dataset.names = "plain"
        check_registered(good)
        good.model.num_classes = 3
        message = error_of(check_registered, good, splits=("test",))
        assert "'plain' has 2 classes but model.num_classes is 3" in message
