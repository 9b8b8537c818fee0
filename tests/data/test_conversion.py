"""lite-detr convert-data: COCO files of datasets in other forms."""

import json
import random

import pytest
from PIL import Image

from lite_detr.commands.convert_data import main
from lite_detr.data.conversion import convert_dataset
from lite_detr.errors import DatasetError

SIZE = (100, 80)
NAMES = "names: [cat, dog]\n"


def write(root, files):
    """Write files by their names: images of SIZE, and texts."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".jpg", ".png")):
            Image.new("RGB", content or SIZE).save(path)
        else:
            path.write_bytes(content.encode())
    return root


def voc_object(name, *corners, more=""):
    tags = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{tag}>{corner}</{tag}>" for tag, corner in zip(tags, corners))
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def voc(*objects, size=SIZE):
    width, height = size
    sides = f"<size><width>{width}</width><height>{height}</height></size>" if width else ""
    return f"<annotation>{sides}{''.join(objects)}</annotation>"


def boxes(content):
    """``{file name: [(class name, box)]}``."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    found = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        box = [round(value, 4) for value in annotation["bbox"]]
        found[annotation["image_id"]].append((names[annotation["category_id"]], box))
    return {image["file_name"]: found[image["id"]] for image in content["images"]}


LAYOUTS = {
    "split inside": ("images/train/a.jpg", "labels/train/a.txt", "images/val/b.jpg"),
    "split outside": ("train/images/a.jpg", "train/labels/a.txt", "valid/images/b.jpg"),
    "year": ("images/train2017/sub/a.jpg", "labels/train2017/sub/a.txt", "images/val2017/b.jpg"),
    "beside": ("train/a.jpg", "train/a.txt", "val/b.jpg"),
    "CVAT": ("obj_train_data/a.jpg", "obj_train_data/a.txt", "obj_Validation_data/b.jpg"),
    "Windows": ("Images/Train/a.JPG", "Labels/Train/a.txt", "Images/Val/b.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_usual_layouts_of_yolo(layout, tmp_path):
    image, label, other = LAYOUTS[layout]
    image = image.replace("JPG", "jpg")
    lines = "\ufeff1 0.5 0.5 0.2 0.5\r\n\r\n0 0.1 0.1 0.1 0.1 0.9\r\n"
    write(tmp_path, {image: None, label: lines, other: None, "data.yaml": NAMES})
    conversion = convert_dataset(tmp_path)
    expected = [("dog", [40, 20, 20, 40]), ("cat", [5, 4, 10, 8])]
    assert boxes(conversion.contents["train"]) == {image: expected}
    assert boxes(conversion.contents["val"]) == {other: []}
    assert f"1 image(s) without a label file, used as without objects: {other}" in conversion.notes


@pytest.mark.parametrize(
    "given",
    [
        "train: ../first\nval: second\n",
        "path: .\ntrain: [first]\nval: [second]\n",
        "train: first.txt\nval: second.txt\n",
    ],
)
def test_folders_and_lists_of_data_yaml(given, tmp_path):
    images = {"first/a.jpg": None, "second/b.jpg": None}
    labels = {"first/a.txt": "0 .5 .5 .5 .5", "second/b.txt": "0 .5 .5 .5 .5"}
    lists = {"first.txt": "./first/a.jpg\r\n", "second.txt": "second/b.jpg\n"}
    write(tmp_path, images | labels | lists | {"data.yaml": given + "names: {0: cat, 2: dog}"})
    contents = convert_dataset(tmp_path).contents
    assert [list(boxes(content)) for content in contents.values()] == [
        ["first/a.jpg"],
        ["second/b.jpg"],
    ]


@pytest.mark.parametrize(
    ("line", "box"),
    [
        ("0 0.1 0.1 0.3 0.1 0.2 0.4", [10, 8, 20, 24]),
        ("0 0.1 0.1 0.3 0.1 0.3 0.4 0.1 0.4", [10, 8, 20, 24]),
        ("0 0.95 0.5 0.2 0.5", [85, 20, 15, 40]),
        ("0.0 5e-1 0.5 0.2 0.5 0.1 0.1 2 0.2 0.2 2", [40, 20, 20, 40]),
    ],
)
def test_polygons_boxes_beyond_the_image_and_keypoints(line, box, tmp_path):
    classes = f"{NAMES}kpt_shape: [2, 3]\n"
    write(tmp_path, {"train/a.jpg": None, "train/a.txt": line, "val/b.jpg": None})
    write(tmp_path, {"data.yaml": classes})
    conversion = convert_dataset(tmp_path)
    assert boxes(conversion.contents["train"]) == {"train/a.jpg": [("cat", box)]}
    noted = {"0.9": "reaching outside the image, clipped", "0.1": "used as upright boxes"}
    expected = noted.get(line[2:5], "")
    assert any(expected in note for note in conversion.notes)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.txt": "0 .5 .5 .5 .5"}, "put a classes.txt with a name on each line, or a data.yaml"),
        (
            {"a.txt": "\n2 .5 .5 .5 .5\n3 .5 .5 .5 .5", "classes.txt": "cat\r\ndog\r\n\r\n"},
            r"a.txt, line 2: class 2 is none of the 2 classes in .*classes.txt, which are 0 to 1 "
            r"\(and 1 more faults",
        ),
        ({"a.txt": "0 .5 .5 .5", "data.yaml": NAMES}, "line 1: a label is a class and four"),
        ({"a.txt": "0 .5 .5 nan .5", "data.yaml": NAMES}, "all finite"),
        ({"a.txt": "0 50 40 20 30", "data.yaml": NAMES}, "look like pixels"),
        ({"a.txt": "0 .5 .5 -.1 .5", "data.yaml": NAMES}, "must not be negative"),
        ({"a.txt": "0 .5 .5 .5 .5", "data.yaml": "names: [cat"}, "data.yaml: not valid YAML"),
        ({"a.txt": "0 .5 .5 .5 .5", "data.yaml": "names: {a: b}"}, "or name each number"),
        ({"c.txt": "0 .5 .5 .5 .5", "data.yaml": NAMES}, "no image has labels. Expected are"),
        ({"a.xml": "<annotation>"}, "a.xml: not valid XML"),
        ({"a.xml": voc("<object><name>cat</name></object>")}, "'cat' has no <bndbox>$"),
        (
            {"a.xml": voc("<object><name>cat</name><robndbox/></object>")},
            "a rotated <robndbox>: detectors here find upright boxes",
        ),
        ({"a.xml": voc(voc_object("cat", 1, "x", 5, 5))}, "'cat' has 'x' as <ymin>"),
        ({"a.xml": voc(voc_object("", 1, 1, 5, 5))}, "an object has no <name>"),
    ],
)
def test_faults_are_named_in_one_line(files, said, tmp_path):
    write(tmp_path, {"a.jpg": None, "b.jpg": None, **files})
    with pytest.raises(DatasetError, match=said) as raised:
        convert_dataset(tmp_path)
    assert "\n" not in str(raised.value)


def test_pascal_voc_counts_pixels_from_1(tmp_path):
    objects = [voc_object("cat", 11, 21, 30, 40), voc_object("dog", "1.0", 1, 100.5, 80)]
    files = {"JPEGImages/a.b.jpg": None, "Annotations/a.b.xml": voc(*objects)}
    files |= {"JPEGImages/c.jpg": None, "Annotations/c.xml": voc(size=(0, 0))}
    files |= {"ImageSets/Main/train.txt": "a.b\n", "ImageSets/Main/val.txt": "c  1\n"}
    files |= {"SegmentationClass/a.b.png": None, "Annotations/gone.xml": voc()}
    conversion = convert_dataset(write(tmp_path, files))
    assert boxes(conversion.contents["train"]) == {
        "JPEGImages/a.b.jpg": [("cat", [10, 20, 20, 20]), ("dog", [0, 0, 100, 80])]
    }
    # The size is that of the image where the file has none.
    (image,) = conversion.contents["val"]["images"]
    assert (image["width"], image["height"]) == SIZE
    assert "1 XML file(s) without an image, left out: Annotations/gone.xml" in conversion.notes
    assert not any("SegmentationClass" in note for note in conversion.notes)


def test_files_that_count_pixels_from_0_are_not_shifted(tmp_path):
    files = {"train/a.jpg": None, "train/a.xml": voc(voc_object("cat", 0, 10, 30, 40))}
    conversion = convert_dataset(write(tmp_path, files | {"val/b.jpg": None, "val/b.xml": voc()}))
    assert boxes(conversion.contents["train"])["train/a.jpg"] == [("cat", [0, 10, 30, 30])]
    assert any("count pixels from 0" in note for note in conversion.notes)


def test_difficult_objects_are_trained_on_and_not_counted_in_evaluation(tmp_path):
    given = voc(voc_object("cat", 1, 1, 30, 40, more="<difficult>1</difficult>"))
    files = {"train/a.jpg": None, "train/a.xml": given, "test/b.jpg": None, "test/b.xml": given}
    files |= {"val/c.jpg": None, "val/c.xml": given, "val/d.jpg": None}
    contents = convert_dataset(write(tmp_path, files)).contents
    crowds = {split: content["annotations"][0]["iscrowd"] for split, content in contents.items()}
    assert crowds == {"train": 0, "val": 1, "test": 1}
    assert all("_difficult" not in c["annotations"][0] for c in contents.values())


def test_an_export_of_roboflow_in_coco_format(tmp_path):
    def coco(name):
        kinds = [("cells", "none"), ("red", "cells"), ("white", "cells")]
        return json.dumps(
            {
                "images": [{"id": 0, "file_name": name, "width": 100, "height": 80}],
                "annotations": [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4]}],
                "categories": [
                    {"id": i, "name": name, "supercategory": group}
                    for i, (name, group) in enumerate(kinds)
                ],
            }
        )

    files = {"train/_annotations.coco.json": coco("a.jpg"), "train/a.jpg": None}
    files |= {"valid/_annotations.coco.json": coco("b.jpg"), "valid/b.jpg": None}
    contents = convert_dataset(write(tmp_path, files)).contents
    assert boxes(contents["val"]) == {"valid/b.jpg": [("red", [1, 2, 3, 4])]}
    assert [c["name"] for c in contents["train"]["categories"]] == ["red", "white"]


@pytest.fixture
def one_file(tmp_path):
    """A COCO file without a split: 20 pictures, of each of which there are two copies."""
    names = [f"p{i}.rf.{copy}{i}.jpg" for i in range(20) for copy in "ab"]
    (tmp_path / "images").mkdir()
    for name in names:
        (tmp_path / "images" / name).touch()
    sides = {"width": 100, "height": 80}
    content = {
        "images": [{"id": i, "file_name": name, **sides} for i, name in enumerate(names)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25}
            for i in range(len(names))
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    path = tmp_path / "all.json"
    path.write_text(json.dumps(content))
    return path


def test_the_split_of_one_file_is_the_same_each_time(one_file):
    def names(**options):
        return set(boxes(convert_dataset(one_file, **options).contents["val"]))

    chosen = names()
    assert len(chosen) == 8 and chosen == names() != names(seed=1)
    # Copies of a picture are on one side.
    assert len({name.split(".")[0] for name in chosen}) == 4
    # More images leave the choice as it is, but for its number.
    content = json.loads(one_file.read_text())
    content["images"] = content["images"][:20]
    content["annotations"] = content["annotations"][:20]
    one_file.write_text(json.dumps(content))
    assert names(val_share=0.5) >= {n for n in chosen if int(n[1:].split(".")[0]) < 10}
    with pytest.raises(DatasetError, match="10 picture.s. cannot be split, with 10 for validation"):
        names(val_share=1.0)


def test_a_folder_with_one_coco_file_and_names_of_windows(one_file, tmp_path):
    """As Label Studio and CVAT export it."""
    content = json.loads(one_file.read_text())
    for image in content["images"]:
        image["file_name"] = f"default\\{image['file_name']}"
    one_file.unlink()
    (tmp_path / "images").rename(tmp_path / "default")
    write(tmp_path, {"annotations/instances.json": json.dumps(content), "notes.json": "[]"})
    (tmp_path / "images").mkdir()
    (tmp_path / "default").rename(tmp_path / "images" / "default")
    conversion = convert_dataset(tmp_path)
    assert conversion.image_root == tmp_path / "images"
    assert len(boxes(conversion.contents["train"])) == 32
    write(tmp_path, {"more.json": json.dumps(content)})
    with pytest.raises(DatasetError, match="has 2 COCO files, .*data.train_json and data.val_json"):
        convert_dataset(tmp_path)


def test_boxes_come_back_from_both_forms(tmp_path):
    rng, voc_files, yolo_files, expected = random.Random(0), {}, {"data.yaml": NAMES}, {}
    for index in range(12):
        split = "val" if index % 4 == 0 else "train"
        size = (rng.randint(50, 2000), rng.randint(50, 2000))
        objects, lines, known = [], [], []
        for _ in range(rng.randint(0, 5)):
            (x1, x2), (y1, y2) = (sorted(rng.sample(range(side + 1), 2)) for side in size)
            number = rng.randint(0, 1)
            name = ("cat", "dog")[number]
            known.append((name, [x1, y1, x2 - x1, y2 - y1]))
            objects.append(voc_object(name, x1 + 1, y1 + 1, x2, y2))
            shares = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
            shares = [value / size[i % 2] for i, value in enumerate(shares)]
            lines.append(" ".join(map(str, [number, *shares])))
        for files, suffix, text in (
            (voc_files, "xml", voc(*objects, size=size)),
            (yolo_files, "txt", "\n".join(lines)),
        ):
            files[f"{split}/{index}.jpg"] = size
            files[f"{split}/{index}.{suffix}"] = text
        expected[f"{split}/{index}.jpg"] = known
    for name, files in (("voc", voc_files), ("yolo", yolo_files)):
        contents = convert_dataset(write(tmp_path / name, files)).contents
        assert boxes(contents["train"]) | boxes(contents["val"]) == expected


def test_the_command_writes_files_and_says_how_to_train(one_file, tmp_path, capsys):
    options = [str(one_file), "--output", str(tmp_path / "my data")]
    main(options)
    printed = capsys.readouterr().out
    assert (
        "32 images, 32 objects" in printed
        and "1 classes have no object in val.json: dog" in printed
    )
    assert (
        f"data.val_json='{tmp_path}/my data/val.json' data.val_images={tmp_path}/images" in printed
    )
    assert len(json.loads((tmp_path / "my data" / "val.json").read_text())["images"]) == 8
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 1
    assert "train.json exists: give another --output, or remove it" in capsys.readouterr().err
