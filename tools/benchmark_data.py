"""Images with random objects, as a data loader's worker makes them."""

import tempfile
import weakref
from pathlib import Path

import detectron2.data.transforms as T
import numpy as np
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from PIL import Image

# A usual size in COCO.
FILE_HEIGHT, FILE_WIDTH = 480, 640
OBJECTS = 10


class RandomBatches:
    """Batches from a JPEG file, by Detectron2's mapper, which reads, resizes and converts.

    In training the mapper also mirrors, and brings 10 random objects for each image. Images and
    objects are the same each time, for every subject with as many classes.

    Args:
        size: of the images that the model takes, (height, width) in pixels.
        batch: images at a time.
        num_classes: of the objects.
        training: as for training, or as for inference.
    """

    def __init__(self, size: tuple[int, int], batch: int, num_classes: int, training: bool):
        folder = tempfile.TemporaryDirectory()
        weakref.finalize(self, folder.cleanup)
        random = np.random.default_rng(0)
        file = Path(folder.name, "image.jpg")
        # Coarse noise, enlarged: as many bytes as a photograph's, which plain noise exceeds.
        noise = random.integers(0, 256, (FILE_HEIGHT // 8, FILE_WIDTH // 8, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((FILE_WIDTH, FILE_HEIGHT), Image.Resampling.BICUBIC)
        image.save(file, quality=95)
        flip = [T.RandomFlip(prob=1.0)] if training else []
        self._mapper = DatasetMapper(
            is_train=training, augmentations=[*flip, T.Resize(size)], image_format="RGB"
        )
        self._records = [
            {
                "file_name": str(file),
                "height": FILE_HEIGHT,
                "width": FILE_WIDTH,
                "annotations": [_random_object(random, num_classes) for _ in range(OBJECTS)],
            }
            for _ in range(batch)
        ]

    def next(self) -> list[dict]:
        """A batch in Detectron2's format, whose collation is to make no more than a list."""
        return [self._mapper(record) for record in self._records]


def _random_object(random: np.random.Generator, num_classes: int) -> dict:
    """From a tenth to half of the image wide and high, wholly in it."""
    extent = random.uniform(0.1, 0.5, 2)
    corner = random.uniform(0, 1 - extent)
    box = np.concatenate([corner, corner + extent]) * np.tile([FILE_WIDTH, FILE_HEIGHT], 2)
    return {
        "bbox": box.tolist(),
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": int(random.integers(num_classes)),
        "iscrowd": 0,
    }
