"""A small COCO dataset for tests, and what they do with it."""

import pytest

from lite_detr.data.coco import DatasetError

DATA_KEYS = ("train_json", "train_images", "val_json", "val_images")

# Category ids are neither contiguous nor in order, and image 20 has no annotation.
CONTENT = {
    "images": [
        {"id": 10, "file_name": "a.jpg", "width": 100, "height": 80},
        {"id": 20, "file_name": "sub/b.jpg", "width": 60, "height": 50},
    ],
    "annotations": [
        {
            "id": 101,
            "image_id": 10,
            "category_id": 7,
            "bbox": [10, 10.5, 20, 30],
            "area": 600,
            "iscrowd": 0,
        },
        {
            "id": 102,
            "image_id": 10,
            "category_id": 3,
            "bbox": [0, 0, 100, 80],
            "area": 8000,
            "iscrowd": 0,
        },
    ],
    "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
}


def error_of(function, *args, **kwargs):
    with pytest.raises(DatasetError) as info:
        function(*args, **kwargs)
    assert info.value.__cause__ is None
    return str(info.value)


def add_boxes(content, *boxes):
    """Adds annotations to image 10 (100 x 80) with ids from 201 on."""
    for i, box in enumerate(boxes, start=201):
        content["annotations"].append(
            {
                "id": i,
                "image_id": 10,
                "category_id": 3,
                "bbox": box,
                "area": 1,
                "iscrowd": 0,
            }
        )
