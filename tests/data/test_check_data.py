"""lite-detr check-data."""

import json

import numpy as np
import pytest
from PIL import Image

from lite_detr.commands.check_data import main
from lite_detr.data.coco import register_coco


@pytest.fixture
def check(tmp_path, capsys):
    """``check(*options)``: the exit status, what was printed, and the report written as JSON."""

    def run(*options):
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        try:
            status = main([*map(str, options), "--workers=1", f"--json={report}"])
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return status, printed, json.loads(report.read_text()) if report.is_file() else None

    return run


@pytest.fixture
def photos(images):
    """The folder with the two images of the sample dataset, in their size."""
    for name, size in (("a.jpg", (100, 80)), ("sub/b.jpg", (60, 50))):
        Image.new("RGB", size).save(images / name)
    return images


@pytest.fixture
def options(content, write, photos):
    """``options(train=..., val=...)``: those of train_net.py, for contents of the two splits."""

    def make(**contents):
        given = []
        for split in ("train", "val"):
            path = write(contents.get(split, content), f"{split}.json")
            given += [f"data.{split}_json={path}", f"data.{split}_images={photos}"]
        return given

    return make


def found(report, split):
    return {fault["kind"]: (fault["outcome"], fault["where"]) for fault in report[split]["faults"]}


def test_a_sound_dataset_is_summarised_and_the_status_is_0(check, options):
    status, printed, report = check(*options())
    assert status == 0
    assert printed.out.count("2 objects: 1 small, 1 medium, 0 large; 0 to 2 (median 1)") == 2
    assert report["train"]["summary"]["objects_by_class"] == {"dog": 1, "cat": 1}
    assert report["train"]["summary"]["width"] == {"smallest": 60, "median": 80, "largest": 100}
    assert report["train"]["summary"]["objects_by_size"] == {"small": 1, "medium": 1, "large": 0}
    assert found(report, "train") == {"image without objects": ("used", [20])}


def test_everything_is_reported_at_once_and_the_status_is_1(check, options, content, photos):
    (photos / "a.jpg").write_bytes(b"")
    Image.fromarray(np.zeros((50, 60), np.uint16)).save(photos / "sub" / "b.jpg", "PNG")
    content["annotations"][0] |= {"category_id": 5, "bbox": [1, 2, float("nan"), 4]}
    content["annotations"][1] |= {"bbox": [5, 5, 0, 0], "iscrowd": "0", "ignore": 1}
    status, printed, report = check(*options())
    assert status == 1
    assert found(report, "train") == {
        "unlisted category": ("refused", [101]),
        "malformed box": ("refused", [101]),
        "malformed crowd flag": ("refused", [102]),
        "'ignore' flag": ("refused", [102]),
        "too many unusable images": ("refused", ["a.jpg"]),
        "degenerate box": ("lost", [102]),
        "unreadable image": ("lost", ["a.jpg"]),
        "grey image of 16 bits": ("changed", ["sub/b.jpg"]),
        "image without objects": ("used", [20]),
        "image with crowd regions alone": ("used", [10]),
        "crowd region": ("used", [102]),
    }
    assert "malformed crowd flag" in found(report, "test")
    assert "a.jpg: not an image of the formats " in printed.out
    outcomes = ["refused before", "lost: skipped", "changed: used", "used, and good"]
    positions = [printed.out.index(text) for text in outcomes]
    assert positions == sorted(positions)


def test_a_clipped_box_alone_is_no_reason_for_status_1(check, options, content):
    content["annotations"][0]["bbox"] = [90, 10, 20, 20]
    status, _, report = check(*options())
    assert status == 0
    assert found(report, "train")["box reaching outside the image"] == ("changed", [101])


def test_a_file_that_is_no_coco_file_does_not_keep_the_other_from_being_checked(check, options):
    status, _, report = check(*options(train="{"))
    assert status == 1
    ((kind, (outcome, _)),) = found(report, "train").items()
    assert (kind, outcome) == ("annotation file", "refused") and report["train"]["summary"] == {}
    assert report["test"]["summary"]["images"] == 2


def test_other_categories_in_validation_are_reported(check, options, content):
    other = json.loads(json.dumps(content))
    other["categories"][0]["name"] = "wolf"
    status, printed, report = check(*options(val=other))
    assert status == 1 and found(report, "test")["different categories"][0] == "refused"
    assert "only the second lists: 7 'wolf'" in printed.out


def test_training_without_annotations_is_reported(check, options, content):
    status, _, report = check(*options(train=content | {"annotations": []}))
    assert status == 1 and found(report, "train")["no objects"][0] == "refused"


def test_missing_files_and_folders_are_reported(check, options, photos):
    (photos / "a.jpg").unlink()
    report = check(*options())[2]
    assert found(report, "train")["missing image file"] == ("refused", ["a.jpg"])
    elsewhere = photos / "elsewhere"
    report = check(*options(), f"data.train_images={elsewhere}")[2]
    assert found(report, "train")["missing image folder"] == ("refused", [str(elsewhere)])


def test_more_objects_than_the_models_queries_are_reported(check, options, content):
    report = check(*options(), "model.queries.num_queries=1")[2]
    assert found(report, "train")["image of more objects than queries"] == ("used", [10])


def test_one_split_can_be_checked_alone(check, options):
    status, _, report = check(*options()[:2])
    assert status == 0 and list(report) == ["train"]


def test_registered_datasets_are_checked_by_their_names(check, content, write, photos):
    register_coco("pets", write(content), photos)
    names = [f"dataloader.{split}.dataset.names=pets" for split in ("train", "test")]
    status, _, report = check(*names, "model.num_classes=2")
    assert status == 0 and list(report) == ["train (pets)", "test (pets)"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["data.train_json=a.json"], "data.train_json and data.train_images go together"),
        (["data.train_jsn=a.json"], "no key data.train_jsn: did you mean data.train_json?"),
        (["--config-file=no_such.py"], "no_such.py"),
        (["dataloader.train.dataset.names=pats"], "'pats'"),
    ],
)
def test_what_cannot_be_checked_is_an_error_with_status_2(given, named, check):
    status, printed, report = check(*given)
    assert status == 2 and report is None
    assert printed.err.startswith("error: ") and named in printed.err
