#!/usr/bin/env python
"""Draw the predictions of a detector in an ONNX file, by NumPy, Pillow and ONNX Runtime alone.

    onnx_demo.py --model detector.onnx --input datasets/digits/val --output output/onnx

The file is one of tools/export.py; it says how images are prepared and what the classes are called.
An image NAME.jpg becomes DIR/NAME.png. The exit status is 1 if an image could not be read.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFont, ImageOps

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


class Detections(NamedTuple):
    """What was found in an image, best first.

    Attributes:
        boxes: ``[N, 4]``, (x1, y1, x2, y2) in pixels of the image.
        scores: ``[N]``
        classes: ``[N]``, int64.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


class OnnxDetector:
    """A detector in a file of ``tools/export.py``.

    Args:
        path: of the file.

    Raises:
        ValueError: the file is of another program, or no ONNX.
    """

    def __init__(self, path: str):
        try:
            self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        # Of ONNX Runtime's own kinds, which have no name that is for others.
        except Exception as error:
            raise ValueError(f"{path} cannot be loaded: {error}") from error
        facts = self.session.get_modelmeta().custom_metadata_map
        if "preprocessing" not in facts:
            raise ValueError(f"{path} does not say how to prepare images; tools/export.py does")
        self.preprocessing = json.loads(facts["preprocessing"])
        self.class_names = json.loads(facts["class_names"])

    def __call__(self, image: Image.Image) -> Detections:
        """Detects in an upright RGB image; empty boxes are left out."""
        width, height = image.size
        resize = self.preprocessing["resize"]
        if resize:
            size = resized(width, height, resize["short_side"], resize["max_size"])
            image = image.resize(size, Image.Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.float32)
        if self.preprocessing["channels"] == "BGR":
            pixels = pixels[:, :, ::-1]
        inputs = {
            "images": np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]),
            "image_sizes": np.array([pixels.shape[:2]], dtype=np.int64),
        }
        outputs = self.session.run(["boxes", "scores", "classes"], inputs)
        boxes, scores, classes = (output[0] for output in outputs)
        scale = np.array([width / image.width, height / image.height] * 2, dtype=np.float32)
        boxes = np.clip(boxes * scale, 0, np.array([width, height] * 2, dtype=np.float32))
        full = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return Detections(boxes[full], scores[full], classes[full])

    def class_name(self, number: int) -> str | int:
        return self.class_names[number] if self.class_names else number


def resized(width: int, height: int, short_side: int, max_size: int) -> tuple[int, int]:
    """Width and height for the shorter side to be ``short_side``, the longer at most ``max_size``.

    Steps and rounding are those of Detectron2's ``ResizeShortestEdge``.
    """
    scale = short_side / min(height, width)
    if height < width:
        new_height, new_width = float(short_side), scale * width
    else:
        new_height, new_width = scale * height, float(short_side)
    if max(new_height, new_width) > max_size:
        scale = max_size / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return int(new_width + 0.5), int(new_height + 0.5)


def read(path: Path) -> Image.Image:
    """An image in RGB, turned as its EXIF orientation says."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def draw(image: Image.Image, found: Detections, detector: OnnxDetector) -> None:
    """Draws boxes with class and score into an image."""
    canvas = ImageDraw.Draw(image)
    line = max(2, round(min(image.size) / 250))
    font = ImageFont.load_default(max(12, min(image.size) // 40))
    # The best last, on top of the others.
    for box, score, number in list(zip(*found))[::-1]:
        colour = COLOURS[number % len(COLOURS)]
        canvas.rectangle(box.tolist(), outline=colour, width=line)
        text = f"{detector.class_name(number)} {score:.0%}"
        corner = (box[0], max(0, box[1] - font.size - line))
        canvas.rectangle(canvas.textbbox(corner, text, font), fill=colour)
        canvas.text(corner, text, "white", font)


def find_images(given: Sequence[Path]) -> list[Path]:
    """Files as they are, and the images in folders."""
    found = []
    for path in given:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        found += [file for file in inside if file == path or file.suffix.lower() in IMAGE_SUFFIXES]
    return found


def entry(path: Path, image: Image.Image, found: Detections, detector: OnnxDetector) -> dict:
    """What the JSON file says of an image, as that of demo.py does."""
    return {
        "file_name": str(path),
        "height": image.height,
        "width": image.width,
        "detections": [
            {
                "class": detector.class_name(number),
                "score": round(score, 5),
                "box": [round(corner, 2) for corner in box],
            }
            for box, score, number in zip(*(values.tolist() for values in found))
        ],
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="FILE.onnx")
    add("--input", required=True, nargs="+", type=Path, help="images, or folders of them")
    add("--output", required=True, type=Path, metavar="DIR", help="made if need be")
    add("--json", type=Path, metavar="FILE.json", help="for classes, scores and boxes")
    add(
        "--confidence-threshold",
        type=float,
        default=0.3,
        metavar="SCORE",
        help="detections scored lower are left out (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and returns its exit status."""
    args = parse_arguments(argv)
    try:
        detector = OnnxDetector(str(args.model))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    args.output.mkdir(parents=True, exist_ok=True)
    entries, failures = [], 0
    for path in find_images(args.input):
        try:
            image = read(path)
        # Pillow's readers raise anything on a broken file.
        except Exception as error:
            print(f"{path}: skipped: {error}", file=sys.stderr)
            entries.append({"file_name": str(path), "problem": str(error)})
            failures += 1
            continue
        found = detector(image)
        sure = found.scores >= args.confidence_threshold
        found = Detections(*(values[sure] for values in found))
        entries.append(entry(path, image, found, detector))
        draw(image, found, detector)
        image.save(args.output / f"{path.stem}.png")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"images: {len(entries) - failures}, failures: {failures}; pictures are in {args.output}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
