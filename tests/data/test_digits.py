import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from lite_detr.commands import make_digits
from lite_detr.data import digits
from lite_detr.data.digits import CLASSES, SPLITS, write_digits_dataset
from lite_detr.data.inspection import count_by_size

SMALL = {"num_train": 6, "num_val": 4, "seed": 3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digits_dataset(root, **SMALL)
    return root


@pytest.fixture(scope="module")
def scenes():
    """Plans of the dataset with the default arguments, by split."""
    sizes = {"train": 500, "val": 80}
    return {split: list(digits.plan_scenes(split, sizes[split], seed=0)) for split in SPLITS}


def read_tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_another_process_with_another_thread_count_writes_the_same_bytes(dataset, tmp_path):
    source = Path(digits.__file__)
    # The file itself and not the package, whose import takes longer than the whole run.
    code = (
        f"import sys; sys.path.append({str(source.parent)!r}); import digits; "
        f"digits.write_digits_dataset({str(tmp_path)!r}, **{SMALL!r})"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert read_tree(tmp_path) == read_tree(dataset)


def test_more_images_leave_the_earlier_ones_as_they_are(scenes):
    fewer = list(digits.plan_scenes("train", 3, seed=0))
    assert digits.coco_dict(fewer) == digits.coco_dict(scenes["train"][:3])


def test_another_seed_gives_another_dataset(dataset, tmp_path):
    write_digits_dataset(tmp_path, **SMALL | {"seed": 4})
    other, first = read_tree(tmp_path), read_tree(dataset)
    assert not any(other[name] == first[name] for name in other.keys() & first.keys())


def test_a_smaller_dataset_replaces_a_larger_one(dataset, tmp_path):
    write_digits_dataset(tmp_path, num_train=7, num_val=5)
    write_digits_dataset(tmp_path, **SMALL)
    assert read_tree(tmp_path) == read_tree(dataset)


@pytest.mark.parametrize(("split", "count"), [("train", 6), ("val", 4)])
def test_written_files_are_valid_coco(dataset, split, count):
    coco = COCO(dataset / f"{split}.json")
    assert [(c["id"], c["name"]) for c in coco.loadCats(coco.getCatIds())] == list(
        enumerate(CLASSES, 1)
    )
    assert len(coco.getImgIds()) == len(list((dataset / split).iterdir())) == count
    for info in coco.loadImgs(coco.getImgIds()):
        with Image.open(dataset / split / info["file_name"]) as image:
            assert image.size == (info["width"], info["height"])
            assert image.mode == "RGB"


@pytest.mark.parametrize("split", SPLITS)
def test_annotations(scenes, split):
    coco = digits.coco_dict(scenes[split])
    images = {image["id"]: image for image in coco["images"]}
    assert len(images) == len(coco["images"])
    assert len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"])
    assert {a["image_id"] for a in coco["annotations"]} == set(images)
    assert {a["category_id"] for a in coco["annotations"]} == set(range(1, 11))
    labels = digits.load_sources()[1]
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]
        image = images[annotation["image_id"]]
        assert x >= 0 and y >= 0 and w > 0 and h > 0
        assert x + w <= image["width"] and y + h <= image["height"]
        assert annotation["area"] == w * h
        assert annotation["iscrowd"] == 0
        assert annotation["category_id"] == labels[annotation["sample"]] + 1
    # JSON has no numpy types.
    assert json.loads(json.dumps(coco)) == coco


@pytest.mark.parametrize("split", SPLITS)
def test_every_coco_size_is_well_represented(scenes, split):
    annotations = digits.coco_dict(scenes[split])["annotations"]
    counts = count_by_size(a["area"] for a in annotations)
    assert sum(counts.values()) == len(annotations)
    assert min(counts.values()) >= 0.15 * len(annotations)


def test_count_by_size_has_the_coco_borders():
    counts = count_by_size([1, 32**2 - 1, 32**2, 96**2 - 1, 96**2])
    assert counts == {"small": 2, "medium": 2, "large": 1}


def test_boxes_are_tight(scenes):
    for scene in scenes["val"]:
        for digit in scene.digits:
            ink = digit.alpha >= digits.INK_ALPHA
            assert ink[0].any() and ink[-1].any() and ink[:, 0].any() and ink[:, -1].any()


def test_ink_is_painted_where_the_box_says(scenes):
    for scene in scenes["val"][:10]:
        (x, y, w, h), alpha = scene.digits[-1].box, scene.digits[-1].alpha
        painted = np.asarray(digits.render(scene))[y : y + h, x : x + w]
        solid = painted[alpha == 255].astype(int)
        assert len(solid) > 0
        assert np.ptp(solid, axis=0).max() == 0


def test_digits_overlap_little(scenes):
    for scene in scenes["train"]:
        for i, first in enumerate(scene.digits):
            for second in scene.digits[:i]:
                (ax, ay, aw, ah), (bx, by, bw, bh) = first.box, second.box
                overlap = max(0, min(ax + aw, bx + bw) - max(ax, bx)) * max(
                    0, min(ay + ah, by + bh) - max(ay, by)
                )
                assert overlap <= 0.1 * min(aw * ah, bw * bh)
                assert overlap <= 0.05 * (aw * ah + bw * bh - overlap)


@pytest.mark.parametrize("background", [0.0, 60.0, 127.5, 200.0, 255.0])
def test_ink_contrasts_with_the_background(background):
    rng = np.random.default_rng(0)
    for tone in np.linspace(0, 1, 20, endpoint=False):
        ink = digits.choose_ink(background, rng.uniform(0, 255, size=3), tone)
        assert ink.min() >= 0 and ink.max() <= 255.01
        assert abs(ink @ [0.299, 0.587, 0.114] - background) >= 90


def test_splits_share_neither_handwriting_nor_photograph(scenes):
    samples, pixels = {}, {}
    photos = digits.load_sources()[2]
    for split in SPLITS:
        coco = digits.coco_dict(scenes[split])
        samples[split] = {a["sample"] for a in coco["annotations"]}
        pixels[split] = [np.zeros((photo.height, photo.width), dtype=bool) for photo in photos]
        for image in coco["images"]:
            x, y, w, h = image["crop"]
            assert min(w, h) >= 100
            window = pixels[split][image["photo"]][y : y + h, x : x + w]
            assert window.shape == (h, w)
            window[:] = True
    assert not samples["train"] & samples["val"]
    for train, val in zip(pixels["train"], pixels["val"], strict=True):
        assert train.any() and val.any() and not (train & val).any()


def test_the_command_skips_only_a_whole_identical_dataset(tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--train", "3", "--val", "2", "--seed", "1"]
    make_digits.main(arguments)
    first = capsys.readouterr().out
    assert "train: 3 images" in first and "val: 2 images" in first
    assert "nothing to do" not in first

    picture = next((tmp_path / "train").iterdir())
    picture.write_bytes(b"touched")
    make_digits.main(arguments)
    assert "nothing to do" in capsys.readouterr().out
    assert picture.read_bytes() == b"touched"

    (tmp_path / "digits.json").unlink()
    make_digits.main(arguments)
    assert capsys.readouterr().out == first
    assert picture.read_bytes() != b"touched"

    make_digits.main([*arguments, "--seed", "2"])
    assert "nothing to do" not in capsys.readouterr().out


def test_an_interrupted_run_is_not_taken_for_a_whole_one(dataset, tmp_path):
    write_digits_dataset(tmp_path, **SMALL)
    assert digits.is_written(tmp_path, **SMALL)

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_digits_dataset(tmp_path, **SMALL, on_image=interrupt)
    assert not digits.is_written(tmp_path, **SMALL)


def test_missing_scikit_learn_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        digits.load_sources.__wrapped__()
