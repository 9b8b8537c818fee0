"""COCO datasets for tests: a sound one in two images, and large ones with planted faults."""

import io
import json
import random
import struct
import zlib
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from lite_detr.data.image_files import OTHER_SIZE, TOO_LARGE, TOO_THIN, UNREADABLE, WIDE_PIXELS
from lite_detr.errors import DatasetError

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
    message = str(info.value)
    # A cycle with this frame, which would keep the workers of a loader alive.
    del info
    return message


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


CATEGORIES = [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}]
EXIF_ORIENTATION = 274


def picture(rng, width, height, mode="RGB"):
    """Noise of a size and a mode of Pillow."""
    pixels = np.frombuffer(rng.randbytes(width * height * 4), np.uint8).reshape(height, width, 4)
    if mode == "I;16":
        return Image.fromarray(pixels[..., :2].copy().view(np.uint16)[..., 0])
    if mode == "I":
        return Image.fromarray(pixels.copy().view(np.int32)[..., 0])
    if mode == "F":
        return Image.fromarray(pixels[..., 0].astype(np.float32))
    if mode == "P":
        return Image.fromarray(pixels[..., :3].copy()).quantize(16)
    image = Image.fromarray(pixels.copy() if mode == "RGBA" else pixels[..., :3].copy())
    return image.convert(mode)


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def truncated(rng, width, height):
    file_format = rng.choice(["JPEG", "PNG", "WEBP", "GIF"])
    content = encoded(picture(rng, width, height), file_format)
    return content[: int(len(content) * rng.uniform(0.4, 0.8))]


def garbage(rng, width, height):
    signature = rng.choice([b"\xff\xd8\xff\xe0\x00\x10JFIF", b"\x89PNG\r\n\x1a\n"])
    return signature + rng.randbytes(rng.randint(1, 400))


def empty(rng, width, height):
    return b""


def page_of_text(rng, width, height):
    return b"<html><body>404: this picture is gone</body></html>"


def claims_to_be_huge(rng, width, height):
    """A PNG whose header promises 400 megapixels."""
    content = bytearray(encoded(picture(rng, width, height), "PNG"))
    content[16:24] = struct.pack(">II", 20_000, 20_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def file_of(mode, file_format, **options):
    return lambda rng, width, height: encoded(
        picture(rng, width, height, mode), file_format, **options
    )


def of_another_size(rng, width, height):
    return encoded(picture(rng, width + rng.randint(1, 9), height), "PNG")


def turned_but_listed_as_stored(rng, width, height):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = rng.choice([5, 6, 7, 8])
    return encoded(picture(rng, width, height), "JPEG", exif=exif)


def turned(rng, width, height):
    """Stored on its side, and turned by its metadata to ``width`` and ``height``."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = rng.choice([5, 6, 7, 8])
    return encoded(picture(rng, height, width), "JPEG", exif=exif)


def animated(rng, width, height):
    frames = [picture(rng, width, height, "P") for _ in range(3)]
    options = {"save_all": True, "append_images": frames[1:]}
    return encoded(frames[0], "GIF", **options)


# What cannot be used, by the kind that it is reported as.
UNUSABLE = {
    UNREADABLE: [truncated, garbage, empty, page_of_text],
    TOO_LARGE: [claims_to_be_huge],
    WIDE_PIXELS: [file_of("F", "TIFF"), file_of("I", "TIFF")],
    OTHER_SIZE: [of_another_size, turned_but_listed_as_stored],
    TOO_THIN: [file_of("RGB", "PNG")],
}
# What is used, by the kinds that it is reported as.
USED = [
    ((), file_of("RGB", "JPEG")),
    ((), file_of("RGB", "PNG")),
    ((), file_of("RGB", "WEBP")),
    (("greyscale image",), file_of("L", "JPEG")),
    (("greyscale image",), file_of("1", "PNG")),
    (("greyscale image", "image with transparency"), file_of("LA", "PNG")),
    (("image with transparency",), file_of("RGBA", "PNG")),
    (("palette image",), file_of("P", "PNG")),
    (("palette image", "image with transparency"), file_of("P", "PNG", transparency=0)),
    (("CMYK image",), file_of("CMYK", "JPEG")),
    (("CMYK image",), file_of("CMYK", "TIFF")),
    (("grey image of 16 bits",), file_of("I;16", "PNG")),
    (("grey image of 16 bits",), file_of("I;16", "TIFF")),
    (("palette image", "image of several frames"), animated),
    (("image turned by EXIF",), turned),
]
SHAPES = [
    ((1, 1), ("image of one pixel's width",)),
    ((1, 17), ("image of one pixel's width",)),
    ((90, 1), ("image of one pixel's width", "panorama")),
    ((120, 6), ("panorama",)),
    ((5, 100), ("panorama",)),
]


class FaultyDataset:
    """A dataset of ``num_images`` in a folder; every kind of fault is there that is not refused.

    Attributes:
        planted: the ids of annotations and images, or names of files, by the kind of fault.
        unusable: the names of the files that cannot be used.
    """

    def __init__(self, folder, seed, num_images, num_unusable):
        self.rng = random.Random(seed)
        self.folder, self.json_file = folder, folder / "instances.json"
        self.image_root = folder / "images"
        self.image_root.mkdir(parents=True)
        self.planted = defaultdict(list)
        self.images, self.annotations, self.unusable = [], [], []
        makers = [(kind, maker) for kind, group in UNUSABLE.items() for maker in group]
        self.rng.shuffle(makers)
        for i in range(num_unusable):
            self.add_unusable(*makers[i % len(makers)])
        for i in range(num_images - num_unusable):
            self.add_used(*USED[i % len(USED)])
        self.rng.shuffle(self.images)
        self.json_file.write_text(
            json.dumps(
                {
                    "images": self.images,
                    "annotations": self.annotations,
                    "categories": CATEGORIES,
                }
            )
        )

    def add_unusable(self, kind, maker):
        thin = kind == TOO_THIN
        size = (1, self.rng.randint(501, 900)) if thin else self.draw_size(square=False)
        name = self.add_image(*size, maker)
        self.unusable.append(name)
        self.planted[kind].append(name)

    def add_used(self, kinds, maker):
        (width, height), more = (self.draw_size(), ())
        if self.rng.random() < 0.2 and maker is not animated:
            (width, height), more = self.rng.choice(SHAPES)
        name = self.add_image(width, height, maker)
        for kind in (*kinds, *more):
            self.planted[kind].append(name)

    def draw_size(self, square=True):
        width, height = self.rng.randint(20, 70), self.rng.randint(20, 70)
        return (width, height) if square or width != height else (width + 1, height)

    def add_image(self, width, height, maker):
        image_id = 7 + 3 * len(self.images)
        name = f"{len(self.images):04}.jpg"
        (self.image_root / name).write_bytes(maker(self.rng, width, height))
        self.images.append(
            {"id": image_id, "file_name": name, "width": width, "height": height},
        )
        self.add_annotations(image_id, width, height)
        return name

    def add_annotations(self, image_id, width, height):
        draw = self.rng.random()
        if draw < 0.15:
            self.planted["image without objects"].append(image_id)
            return
        if draw < 0.25:
            self.planted["image with crowd regions alone"].append(image_id)
            self.add_box(image_id, [0, 0, width, height], "crowd region", iscrowd=1)
            return
        if draw < 0.28:
            self.planted["image of more objects than queries"].append(image_id)
            for i in range(1000):
                side = 0.2 + i / 2000
                self.add_box(image_id, [0, 0, width * side, height * side])
            return
        box = [width * 0.25, height * 0.25, width * 0.5, height * 0.5]
        self.add_box(image_id, box)
        faults = {
            "degenerate box": [width / 2, height / 2, 0, -3],
            "box outside the image": [width + 5, 1, 9, 9],
            "box reaching outside the image": [-width / 2, -height / 2, width, height],
            "annotation listed twice": box,
        }
        for kind, bad in faults.items():
            if self.rng.random() < 0.2:
                self.add_box(image_id, bad, kind)
        if self.rng.random() < 0.1:
            self.add_box(
                image_id, [0, 0, width / 2, 1], "malformed mask", segmentation=[[1, 2, 3, 4]]
            )

    def add_box(self, image_id, box, kind=None, **fields):
        annotation = {
            "id": len(self.annotations) + 1,
            "image_id": image_id,
            "category_id": self.rng.choice(CATEGORIES)["id"],
            "bbox": box,
            "area": abs(box[2] * box[3]),
            "iscrowd": 0,
        }
        if kind == "annotation listed twice":
            twin = next(a for a in self.annotations if a["image_id"] == image_id)
            annotation["category_id"] = twin["category_id"]
        self.annotations.append(annotation | fields)
        if kind:
            self.planted[kind].append(annotation["id"])
