"""Checks of COCO-format datasets."""

import errno
import os
import shutil

import pytest
from coco_datasets import add_boxes, error_of
from detectron2.data import DatasetCatalog

from lite_detr.data.coco import CocoSummary, check_coco, register_coco
from lite_detr.data.coco_checks import find_faults
from lite_detr.data.faults import Outcome


class TestCheckCoco:
    def test_good_dataset(self, content, write, images, warnings):
        summary = check_coco(write(content), images, for_evaluation=True)
        assert summary == CocoSummary(2, 2, ("cat", "dog"), (3, 7), 2)
        assert warnings == []

    def test_paths_as_strings(self, content, write, images):
        assert check_coco(str(write(content)), str(images)).num_images == 2

    def test_no_annotations(self, content, write, images, warnings):
        content["annotations"] = []
        assert check_coco(write(content), images).num_annotations == 0
        assert warnings == []

    def test_missing_json(self, tmp_path, images):
        for path in (tmp_path / "nowhere.json", tmp_path):
            assert error_of(check_coco, path, images).startswith(f"{path}: annotation file not")

    def test_not_json(self, write, images):
        path = write('{"images": [],\n  "annotations" []}')
        message = error_of(check_coco, path, images)
        assert str(path) in message and "line 2, column 17" in message

    def test_not_text(self, write, images):
        path = write("")
        path.write_bytes(b"\xff\xd8\xff\xe0 a jpeg")
        message = error_of(check_coco, path, images)
        assert str(path) in message and "UTF-8" in message

    def test_not_given_by_the_system(self, write, images, monkeypatch):
        def refuse(*args, **kwargs):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        path = write("{}")
        monkeypatch.setattr("builtins.open", refuse)
        message = error_of(check_coco, path, images)
        assert message.startswith(f"{path}: cannot be read (Permission denied); check its perm")

    def test_list_instead_of_object(self, write, images):
        path = write([{"image_id": 1, "score": 0.5}])
        message = error_of(check_coco, path, images)
        assert str(path) in message and "holds a JSON list" in message

    @pytest.mark.parametrize("key", ["images", "annotations", "categories"])
    def test_missing_or_wrong_section(self, key, content, write, images):
        content[key] = {"id": 1}
        path = write(content)
        message = error_of(check_coco, path, images)
        assert message.startswith(f"{path}: '{key}' is a dict")
        del content[key]
        path = write(content)
        message = error_of(check_coco, path, images)
        assert message.startswith(f"{path}: '{key}' is missing")
        assert "images, annotations, categories" in message

    @pytest.mark.parametrize("key", ["images", "categories"])
    def test_empty_section(self, key, content, write, images):
        content[key] = []
        path = write(content)
        assert error_of(check_coco, path, images).startswith(f"{path}: '{key}' is empty")

    @pytest.mark.parametrize("key", ["images", "annotations", "categories"])
    def test_duplicate_id(self, key, content, write, images):
        repeated = content[key][0]
        content[key].append(repeated)
        path = write(content)
        message = error_of(check_coco, path, images)
        assert str(path) in message and f"'{key}'" in message and str(repeated["id"]) in message

    @pytest.mark.parametrize("key", ["images", "annotations", "categories"])
    @pytest.mark.parametrize("entry", [17, {"name": "no id"}, {"id": "5"}, {"id": True}])
    def test_entry_without_integer_id(self, key, entry, content, write, images):
        content[key].append(entry)
        path = write(content)
        message = error_of(check_coco, path, images)
        assert f"{path}: entry 2 of '{key}'" in message and repr(entry) in message

    def test_category_without_name(self, content, write, images):
        del content["categories"][0]["name"]
        path = write(content)
        message = error_of(check_coco, path, images)
        assert str(path) in message and "category 7" in message

    @pytest.mark.parametrize("name", [None, "", 5])
    def test_image_without_file_name(self, name, content, write, images):
        content["images"][1]["file_name"] = name
        path = write(content)
        message = error_of(check_coco, path, images)
        assert str(path) in message and "image 20" in message and "'file_name'" in message

    @pytest.mark.parametrize("height", [None, 0, -4, "50"])
    def test_image_without_size(self, height, content, write, images):
        content["images"][1]["height"] = height
        path = write(content)
        message = error_of(check_coco, path, images)
        assert str(path) in message and "image 20" in message and repr(height) in message

    def test_missing_image_folder(self, content, write, tmp_path):
        path = write(content)
        message = error_of(check_coco, path, tmp_path / "photos")
        assert str(path) in message and f"image folder {tmp_path / 'photos'} not found" in message

    def test_missing_images(self, content, write, images):
        for i in range(5):
            content["images"].append(
                {
                    "id": i,
                    "file_name": f"lost/{i}.jpg",
                    "width": 5,
                    "height": 5,
                }
            )
        path = write(content)
        message = error_of(check_coco, path, images)
        assert f"{path}: 5 of 7 image files not found under {images}" in message
        assert "lost/0.jpg, lost/1.jpg, lost/2.jpg, ..." in message

    def test_folder_in_place_of_an_image(self, content, write, images):
        (images / "a.jpg").unlink()
        (images / "a.jpg").mkdir()
        assert "1 of 2 image files not found" in error_of(check_coco, write(content), images)

    def test_linked_images(self, content, write, images):
        shutil.move(images / "a.jpg", images / "elsewhere.jpg")
        (images / "a.jpg").symlink_to(images / "elsewhere.jpg")
        check_coco(write(content), images)
        (images / "elsewhere.jpg").unlink()
        assert "a.jpg" in error_of(check_coco, write(content), images)

    @pytest.mark.parametrize("category_id", [9, None, "3", [3]])
    def test_unlisted_category(self, category_id, content, write, images):
        content["annotations"][1]["category_id"] = category_id
        path = write(content)
        message = error_of(check_coco, path, images)
        assert f"{path}: annotation 102 has category_id {category_id!r}" in message
        assert "(listed: 3, 7)" in message

    def test_unlisted_image(self, content, write, images):
        for annotation in content["annotations"]:
            annotation["image_id"] = 99
        path = write(content)
        message = error_of(check_coco, path, images)
        assert f"{path}: annotation 101 has image_id 99" in message
        assert "(and 1 more like it)" in message

    @pytest.mark.parametrize(
        "box",
        [
            None,
            [],
            [1, 2, 3],
            [1, 2, 3, 4, 5],
            "1234",
            [1, 2, "3", 4],
            [1, 2, None, 4],
            [1, 2, True, 4],
            [1, 2, float("nan"), 4],
            [1, 2, float("inf"), 4],
            [1, 2, 10**400, 4],
            {"x": 1},
        ],
    )
    def test_malformed_box(self, box, content, write, images):
        content["annotations"][1]["bbox"] = box
        path = write(content)
        message = error_of(check_coco, path, images)
        assert f"{path}: annotation 102 must have a 'bbox' of four finite numbers" in message

    def test_missing_box(self, content, write, images):
        del content["annotations"][0]["bbox"]
        path = write(content)
        assert f"{path}: annotation 101 must have a 'bbox'" in error_of(check_coco, path, images)

    def test_ignore_flag(self, content, write, images):
        content["annotations"][0]["ignore"] = 1
        path = write(content)
        assert f"{path}: annotation 101 has 'ignore'" in error_of(check_coco, path, images)

    @pytest.mark.parametrize("flag", ["0", 2, None, [1]])
    def test_malformed_crowd_flag(self, flag, content, write, images):
        """Detectron2 would take "0" for a crowd region and leave the object out."""
        content["annotations"][0]["iscrowd"] = flag
        path = write(content)
        message = error_of(check_coco, path, images)
        assert (
            f"{path}: annotation 101 must have 0 or 1 as 'iscrowd', but it is {flag!r}" in message
        )

    @pytest.mark.parametrize(
        "mask",
        [
            [[]],
            [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]],
            [1, 2, 3, 4, 5, 6],
            [[1, 2, 3, 4, 5, "6"]],
            [[1, 2, 3, 4, 5, float("nan")]],
            [{"x": 1}],
            "mask",
            5,
            {"counts": [1, 2]},
            {"counts": [1, 2], "size": "ab"},
            {"counts": [1, 2], "size": [80, 100]},
            {"counts": [-1, 8001], "size": [80, 100]},
            {"counts": "a", "size": [1]},
            {"counts": "a", "size": [80, 100]},
            {"counts": "`g7", "size": [80, 100]},  # of 7,920 pixels, not 8,000
            {"counts": "\u00e9", "size": [80, 100]},
        ],
    )
    def test_a_broken_mask_leaves_its_box(self, mask, content, write, images, warnings):
        """Detectron2 drops the annotation, or fails in the middle."""
        content["annotations"][0] |= {"segmentation": mask, "keypoints": "x"}
        path = write(content)
        register_coco("pets", path, images)
        (message,) = warnings
        assert message.startswith(f"{path}: 1 annotation(s) whose 'segmentation' is neither poly")
        assert message.endswith("used with their box alone: annotation ids 101")
        annotations = [record["annotations"] for record in DatasetCatalog.get("pets")]
        assert [len(of_image) for of_image in annotations] == [2, 0]
        assert "segmentation" not in annotations[0][0]

    @pytest.mark.parametrize(
        ("mask", "loaded"),
        [
            ([], None),
            (None, None),
            ([[1, 1, 9, 1, 9, 9]], [[1, 1, 9, 1, 9, 9]]),
            ([[1, 1], [1, 1, 9, 1, 9, 9]], [[1, 1, 9, 1, 9, 9]]),
            ({"counts": [8000], "size": [80, 100]}, {"counts": b"Pj7", "size": [80, 100]}),
            ({"counts": "Pj7", "size": [80, 100]}, {"counts": "Pj7", "size": [80, 100]}),
        ],
    )
    def test_sound_or_no_mask(self, mask, loaded, content, write, images, warnings):
        content["annotations"][0]["segmentation"] = mask
        register_coco("pets", write(content), images)
        assert warnings == []
        assert DatasetCatalog.get("pets")[0]["annotations"][0].get("segmentation") == loaded

    def test_masks_of_the_catalog_are_those_of_detectron2(self, content, write, images):
        """Which loads them by itself."""

        def faults(mask, **more):
            content["annotations"][0] |= {"segmentation": mask, **more}
            found = find_faults("x", str(images), content, False, in_catalog=True)
            return [(fault.kind, fault.outcome) for fault in found]

        assert faults([[1, 1, 9, 1, 9, 9]], keypoints=[1, 2, 2]) == []
        assert faults([[]]) == [("mask without area", Outcome.LOST)]
        assert faults("mask") == [("malformed mask", Outcome.REFUSED)]
        assert faults([], keypoints="x") == [("malformed mask", Outcome.REFUSED)]

    @pytest.mark.parametrize("area", [None, "9", True, float("nan"), -1, 0, -0.0, 1e11, 10**400])
    def test_an_area_that_is_a_placeholder(self, area, content, write, images, warnings):
        content["annotations"][0]["area"] = area
        path = write(content)
        check_coco(path, images)
        assert warnings == []
        check_coco(path, images, for_evaluation=True)
        (message,) = warnings
        assert "1 annotation(s) whose 'area' is not a positive number" in message
        assert message.endswith("evaluated with the area of their box: annotation ids 101")

    def test_equal_names_of_categories(self, content, write, images):
        for category in content["categories"]:
            category["name"] = "cat"
        path = write(content)
        message = error_of(check_coco, path, images)
        assert message.startswith(f"{path}: 2 categories have the name 'cat', so that results")
        assert "ids 7, 3" in message

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("[" * 100_000, "nested too deeply"),
            ('{"images": [' + "9" * 5000 + "]}", "holds a number that cannot be read"),
            ('{"images": [{"id": ' + "9" * 4000 + "}]}", "an 'id' of more than 64 bits"),
        ],
    )
    def test_hostile_json(self, text, problem, write, images):
        path = write(
            '{"annotations": [], "categories": [], ' + text[1:] if text[0] == "{" else text
        )
        message = error_of(check_coco, path, images)
        assert message.startswith(f"{path}: ") and problem in message and len(message) < 500

    @pytest.mark.parametrize("name", ["a\0.jpg", "\ud800.jpg", "a" * 5000, "\udcff\n.jpg"])
    def test_names_of_files_that_no_file_can_have(self, name, content, write, images):
        content["images"][0]["file_name"] = name
        message = error_of(check_coco, write(content), images)
        assert "1 of 2 image files not found" in message
        assert message.isprintable()

    def test_a_name_of_a_class_that_is_not_text(self, content, write, images):
        content["categories"][0]["name"] = "\ud800"
        assert r"but it is '\ud800'" in error_of(check_coco, write(content), images)

    @pytest.mark.parametrize(
        ("boxes", "problem"),
        [
            ([[5, 5, 0, 9], [5, 5, 9, -1]], "zero or negative width or height, ignored"),
            ([[100, 5, 9, 9], [5, -9, 9, 9]], "wholly outside the image, ignored"),
            ([[95, 5, 9, 9], [-1, 5, 9, 9]], "reaching outside the image, clipped"),
        ],
    )
    def test_warns_about_boxes(self, boxes, problem, content, write, images, warnings):
        add_boxes(content, *boxes)
        path = write(content)
        assert check_coco(path, images).num_annotations == 4
        (message,) = warnings
        assert message.startswith(f"{path}: 2 box(es)")
        assert problem in message and message.endswith("annotation ids 201, 202")

    def test_warns_once_for_each_kind(self, content, write, images, warnings):
        add_boxes(content, [300, 5, 9, 9], [95, 5, 9, 9], *[[5, 5, 0, 0]] * 9)
        check_coco(write(content), images)
        assert len(warnings) == 3
        assert "9 box(es)" in warnings[0] and warnings[0].endswith("203, 204, 205, 206, 207, ...")

    def test_does_not_warn_about_rounding(self, content, write, images, warnings):
        add_boxes(content, [50.01, 5, 50, 9], [-0.01, 5, 9, 9])
        check_coco(write(content), images)
        assert warnings == []
