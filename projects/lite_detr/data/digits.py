"""A small, offline detection dataset: handwritten digits pasted on photographs.

The digits (8x8 scans) and the two photographs ship with scikit-learn, so nothing is downloaded.
Every image has its own random stream, seeded by (seed, split, index): the files depend only on the
arguments of :func:`write_digits_dataset`.

A split is made in two steps: :func:`plan_scenes` places the digits and renders their masks, which
is all that the annotations need; :func:`render` paints a planned scene.
"""

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

CLASSES = tuple("0123456789")
SPLITS = ("train", "val")

CANVAS_SIDE = (224, 320)  # px, inclusive
MIN_CROP_SIDE = 100  # px of the photograph
MAX_DIGITS = 16
DIGIT_SIZE = (14, 170)  # px, sqrt(box area)
MAX_CANVAS_SHARE = 0.9  # of the canvas side that a digit may span
MAX_ROTATION = 12.0  # degrees
PLACEMENT_TRIES = 50
MAX_IOU = 0.05
MAX_COVERED = 0.10  # share of a box that another box may cover

INK_ALPHA = 64  # of 255; the box encloses the pixels with at least this alpha
MIN_CONTRAST = 110.0  # luminance of 255, between ink and the mean background under it
HALO_OPACITY = 0.75

# Part of the marker file: raise it when the same arguments give different files.
GENERATOR_VERSION = 1
MARKER = "digits.json"

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class Digit:
    """One placed digit.

    Attributes:
        label: 0..9.
        sample: index of the scan in ``sklearn.datasets.load_digits``.
        alpha: (h, w) uint8 ink mask, cropped to its ink.
        x, y: top left corner of the mask on the canvas, px.
        tint: (3,) RGB, 0..255; gives the hue of the ink.
        tone: in [0, 1); picks the luminance of the ink among those with enough contrast.
    """

    label: int
    sample: int
    alpha: np.ndarray
    x: int
    y: int
    tint: np.ndarray
    tone: float

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Return the COCO box (x, y, w, h) in px."""
        height, width = self.alpha.shape
        return self.x, self.y, width, height


@dataclass(frozen=True)
class Scene:
    """The plan of one image.

    Attributes:
        image_id: 1-based, unique in its split.
        width, height: canvas size, px.
        photo: index of the background photograph.
        crop: (x, y, w, h) of the background in the photograph, px.
        flip: whether the background is mirrored left to right.
        digits: in painting order.
    """

    image_id: int
    width: int
    height: int
    photo: int
    crop: tuple[int, int, int, int]
    flip: bool
    digits: tuple[Digit, ...]

    @property
    def file_name(self) -> str:
        return f"digits_{self.image_id:06d}.jpg"


@functools.cache
def load_sources() -> tuple[np.ndarray, np.ndarray, tuple[Image.Image, ...]]:
    """Load the scans (1797, 8, 8) uint8 in 0..255, their labels (1797,), and the photographs."""
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise ImportError(
            "The digits dataset is made from data that scikit-learn ships: "
            "run `pip install scikit-learn`."
        ) from error
    scans = load_digits()
    photos = tuple(Image.fromarray(photo) for photo in load_sample_images().images)
    return np.round(scans.images * (255 / 16)).astype(np.uint8), scans.target, photos


def split_samples(split: str, seed: int) -> np.ndarray:
    """Return the indices of a split's scans: 80 % of them for train, the rest for val."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(load_sources()[1]))
    cut = len(order) * 4 // 5
    return order[:cut] if split == "train" else order[cut:]


def split_columns(split: str, photo_width: int) -> tuple[int, int]:
    """Return the half-open range of a split's photograph columns: left 2/3 or right 1/3."""
    cut = photo_width * 2 // 3
    return (0, cut) if split == "train" else (cut, photo_width)


def plan_scenes(split: str, count: int, seed: int) -> Iterator[Scene]:
    """Plan the ``count`` images of a split."""
    samples = split_samples(split, seed)
    # Numbered from 1: PCG64 ignores trailing zeros, and PCG64(seed) has drawn the sample split.
    split_id = 1 + SPLITS.index(split)
    for image_id in range(1, count + 1):
        rng = np.random.Generator(np.random.PCG64([seed, split_id, image_id]))
        yield _plan_scene(split, image_id, samples, rng)


def _plan_scene(split: str, image_id: int, samples: np.ndarray, rng: np.random.Generator) -> Scene:
    photos = load_sources()[2]
    width, height = (int(side) for side in rng.integers(*CANVAS_SIDE, size=2, endpoint=True))
    photo = int(rng.integers(len(photos)))
    left, right = split_columns(split, photos[photo].width)
    # The crop has the shape of the canvas, so that the photograph is not distorted.
    zoom = rng.uniform(
        MIN_CROP_SIDE / min(width, height),
        min((right - left) / width, photos[photo].height / height),
    )
    crop_width, crop_height = round(zoom * width), round(zoom * height)
    crop_x = int(rng.integers(left, right - crop_width, endpoint=True))
    crop_y = int(rng.integers(photos[photo].height - crop_height, endpoint=True))
    return Scene(
        image_id=image_id,
        width=width,
        height=height,
        photo=photo,
        crop=(crop_x, crop_y, crop_width, crop_height),
        flip=bool(rng.integers(2)),
        digits=_place_digits(width, height, samples, rng),
    )


def _place_digits(
    width: int, height: int, samples: np.ndarray, rng: np.random.Generator
) -> tuple[Digit, ...]:
    scans, labels, _ = load_sources()
    count = int(rng.integers(1, MAX_DIGITS, endpoint=True))
    sizes = np.exp(rng.uniform(*np.log(DIGIT_SIZE), size=count))
    placed: list[Digit] = []
    # Largest first: otherwise the large ones seldom find room.
    for size in sorted(sizes, reverse=True):
        sample = int(rng.choice(samples))
        alpha = draw_glyph(
            scans[sample],
            size=size,
            degrees=rng.uniform(-MAX_ROTATION, MAX_ROTATION),
            max_width=MAX_CANVAS_SHARE * width,
            max_height=MAX_CANVAS_SHARE * height,
        )
        tint, tone = rng.uniform(0, 255, size=3), rng.random()
        for _ in range(PLACEMENT_TRIES):
            x = int(rng.integers(width - alpha.shape[1], endpoint=True))
            y = int(rng.integers(height - alpha.shape[0], endpoint=True))
            digit = Digit(int(labels[sample]), sample, alpha, x, y, tint, tone)
            if not any(_collide(digit.box, other.box) for other in placed):
                placed.append(digit)
                break
    return tuple(placed)


def _collide(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    """Return whether two COCO boxes overlap more than the dataset allows."""
    overlap_w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    overlap_h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if overlap_w <= 0 or overlap_h <= 0:
        return False
    overlap, area_a, area_b = overlap_w * overlap_h, a[2] * a[3], b[2] * b[3]
    iou = overlap / (area_a + area_b - overlap)
    return iou > MAX_IOU or overlap > MAX_COVERED * min(area_a, area_b)


def draw_glyph(
    scan: np.ndarray, size: float, degrees: float, max_width: float, max_height: float
) -> np.ndarray:
    """Turn a scan into a smooth ink mask.

    Args:
        scan: (8, 8) uint8, 0 paper .. 255 ink.
        size: wanted square root of the mask's area, px.
        degrees: counter-clockwise rotation.
        max_width, max_height: px; the mask is made smaller than ``size`` if it must be.

    Returns:
        (h, w) uint8 alpha whose four outer rows and columns all hold ink (>= ``INK_ALPHA``).
    """
    # A margin of two cells holds a rotated scan.
    cell = 16  # px; the largest digits look smooth already, a finer master only takes longer
    master = Image.fromarray(np.pad(scan, 2))
    master = master.resize((12 * cell, 12 * cell), Image.Resampling.BICUBIC)
    master = master.rotate(degrees, Image.Resampling.BICUBIC)
    # A scan's cell says how much of it was inked, so the edge of a stroke is a level of the
    # upscaled scan. Without the sharpening no one level both opens the small holes (4, 8, 9) and
    # keeps the faint strokes.
    master = master.filter(ImageFilter.UnsharpMask(radius=cell, percent=400, threshold=0))
    master = _crop_to_ink(master.point([min(max((v - 105) * 6, 0), 255) for v in range(256)]))
    scale = min(
        size / math.sqrt(master.width * master.height),
        max_width / master.width,
        max_height / master.height,
    )
    target = (round(master.width * scale), round(master.height * scale))
    return np.asarray(_crop_to_ink(master.resize(target, Image.Resampling.LANCZOS)))


def _crop_to_ink(alpha: Image.Image) -> Image.Image:
    return alpha.crop(alpha.point([255 * (v >= INK_ALPHA) for v in range(256)]).getbbox())


def render(scene: Scene) -> Image.Image:
    """Paint a scene, and return an RGB image of its size."""
    x, y, width, height = scene.crop
    # Cropped first: a resize of the whole photograph would read pixels across the split's border.
    background = load_sources()[2][scene.photo].crop((x, y, x + width, y + height))
    background = background.resize((scene.width, scene.height), Image.Resampling.BICUBIC)
    if scene.flip:
        background = background.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas = np.asarray(background, dtype=np.float32).copy()
    for digit in scene.digits:
        _paint_digit(canvas, digit)
    return Image.fromarray(np.round(canvas).astype(np.uint8))


def _paint_digit(canvas: np.ndarray, digit: Digit) -> None:
    """Blend a digit and its halo into ``canvas`` ((H, W, 3) float32, 0..255), in place."""
    x, y, width, height = digit.box
    alpha = digit.alpha.astype(np.float32) / 255
    # Not a tensordot: BLAS may sum in another order with another number of threads.
    under = (alpha[..., None] * canvas[y : y + height, x : x + width]).sum((0, 1)) / alpha.sum()
    ink = choose_ink(float(under @ _LUMA), digit.tint, digit.tone)
    halo_colour = np.float32(0 if ink @ _LUMA > under @ _LUMA else 255)

    radius = min(max(0.02 * math.sqrt(width * height), 1.0), 2.0)
    margin = math.ceil(3 * radius)
    halo = Image.fromarray(np.pad(digit.alpha, margin)).filter(ImageFilter.GaussianBlur(radius))
    # Doubled, as the blur leaves half of the ink's opacity at its edge.
    halo_alpha = np.minimum(np.asarray(halo, dtype=np.float32) * (2 / 255), 1) * HALO_OPACITY
    top, left = max(y - margin, 0), max(x - margin, 0)
    region = canvas[top : y + height + margin, left : x + width + margin]
    halo_alpha = halo_alpha[top - (y - margin) :, left - (x - margin) :]
    halo_alpha = halo_alpha[: region.shape[0], : region.shape[1], None]
    region += halo_alpha * (halo_colour - region)

    region = canvas[y : y + height, x : x + width]
    region += alpha[..., None] * (ink - region)


def choose_ink(background: float, tint: np.ndarray, tone: float) -> np.ndarray:
    """Return a colour with the hue of ``tint`` and a luminance far from the background's.

    Args:
        background: luminance, 0..255.
        tint: (3,) RGB, 0..255.
        tone: in [0, 1), the place in the luminances at least ``MIN_CONTRAST`` away.

    Returns:
        (3,) float32 RGB, 0..255.
    """
    darker = max(background - MIN_CONTRAST, 0.0)
    lighter = max(255 - MIN_CONTRAST - background, 0.0)
    luminance = tone * (darker + lighter)
    if luminance >= darker:
        luminance = background + MIN_CONTRAST + luminance - darker
    tint = tint.astype(np.float32)
    tint_luminance = float(tint @ _LUMA)
    if luminance <= tint_luminance:
        return tint * (luminance / tint_luminance)
    return tint + (255 - tint) * ((luminance - tint_luminance) / (255 - tint_luminance))


def coco_dict(scenes: Iterable[Scene]) -> dict:
    """Return the COCO detection annotations of a split.

    Beyond the COCO fields, an image has ``photo`` and ``crop`` ([x, y, w, h], px), its background,
    and an annotation has ``sample``, its scan.
    """
    images, annotations = [], []
    for scene in scenes:
        images.append(
            {
                "id": scene.image_id,
                "file_name": scene.file_name,
                "width": scene.width,
                "height": scene.height,
                "photo": scene.photo,
                "crop": list(scene.crop),
            }
        )
        for digit in scene.digits:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": scene.image_id,
                    "category_id": digit.label + 1,
                    "bbox": list(digit.box),
                    "area": digit.box[2] * digit.box[3],
                    "iscrowd": 0,
                    "sample": digit.sample,
                }
            )
    return {
        "info": {"description": "Handwritten digits on photographs"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": i, "name": name, "supercategory": "digit"} for i, name in enumerate(CLASSES, 1)
        ],
    }


def write_digits_dataset(
    root: str | Path,
    num_train: int = 500,
    num_val: int = 80,
    seed: int = 0,
    *,
    on_image: Callable[[], object] = lambda: None,
) -> None:
    """Write the dataset: ``root/{train,val}.json`` and the images in ``root/{train,val}/``.

    The same arguments give the same bytes. The files of an earlier call are replaced.

    Args:
        root: folder, created if need be.
        num_train, num_val: number of images.
        seed: non-negative.
        on_image: called after each image.
    """
    root = Path(root)
    marker = root / MARKER
    marker.unlink(missing_ok=True)
    for split, count in zip(SPLITS, (num_train, num_val), strict=True):
        folder = root / split
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("digits_*.jpg"):
            stale.unlink()
        scenes = _save_images(plan_scenes(split, count, seed), folder, on_image)
        (root / f"{split}.json").write_text(json.dumps(coco_dict(scenes)))
    marker.write_text(_marker_text(num_train, num_val, seed))


def is_written(root: str | Path, num_train: int = 500, num_val: int = 80, seed: int = 0) -> bool:
    """Return whether :func:`write_digits_dataset` has completed with these arguments."""
    marker = Path(root) / MARKER
    return marker.is_file() and marker.read_text() == _marker_text(num_train, num_val, seed)


def _marker_text(num_train: int, num_val: int, seed: int) -> str:
    images = dict(zip(SPLITS, (num_train, num_val)))
    return json.dumps({"generator_version": GENERATOR_VERSION, "images": images, "seed": seed})


def _save_images(
    scenes: Iterable[Scene], folder: Path, on_image: Callable[[], object]
) -> Iterator[Scene]:
    """Save each scene's image, then yield the scene."""
    for scene in scenes:
        # Without chroma subsampling, which would wash out the colour of thin strokes.
        render(scene).save(folder / scene.file_name, quality=92, subsampling=0)
        on_image()
        yield scene
