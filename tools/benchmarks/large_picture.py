#!/usr/bin/env python
"""Measure what slices find in a large picture, beside the detector on the whole of it.

large_picture.py --weights output/demo/model_final.pth --output output/large

The picture is a mosaic of digits that the detector has not seen, enlarged. It is written to
--output with its annotations and a before-and-after picture of a part of it.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from detectron2.structures import Boxes, Instances, pairwise_iou
from PIL import Image, ImageDraw

from lite_detr import cli
from lite_detr.data.coco import register_coco
from lite_detr.data.digits import CANVAS_SIDE, CLASSES, write_digits_dataset
from lite_detr.data.evaluator import DetectionEvaluator
from lite_detr.inference.pictures import draw_detections
from lite_detr.inference.predictor import TrainedDetector, load_trained_config

# For AP also those that are not drawn count.
MIN_SCORE, DRAWN_SCORE = 0.05, 0.3
MIN_IOU = 0.5
PANEL, GAP = 520, 8
# The part that is shown, in parts of the side.
SHOWN = 0.14
FRAME = (213, 94, 0)


class Result(NamedTuple):
    """Detections, and the seconds that they took."""

    instances: Instances
    seconds: float


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--config-file", default="digits/lite_dino_efficientnet_lite0.py", metavar="FILE")
    add("--weights", required=True, metavar="FILE", help="of a detector of digits")
    add("--output", type=cli.folder, required=True, metavar="DIR")
    add("--side", type=cli.whole_number(1000), default=12000, metavar="PIXELS")
    add("--scale", type=cli.whole_number(1), default=2, metavar="N", help="enlarge digits N times")
    add("--slice", type=cli.whole_number(1), default=640, metavar="PIXELS")
    add("--postprocess", default="NMS", choices=("NMS", "NMM", "GREEDYNMM"), help="of SAHI")
    add("--batch-size", type=cli.whole_number(1), default=4, metavar="N")
    add("--seed", type=cli.whole_number(1), default=1, metavar="N")
    return parser.parse_args(argv)


def make_mosaic(side: int, scale: int, seed: int) -> tuple[Image.Image, list[dict]]:
    """Return the picture, and its annotations in COCO's format."""
    cell = CANVAS_SIDE[1] * scale
    columns = side // cell
    mosaic, annotations = Image.new("RGB", (side, side), (128, 128, 128)), []
    with tempfile.TemporaryDirectory() as folder:
        write_digits_dataset(Path(folder), num_train=1, num_val=columns**2, seed=seed)
        content = json.loads(Path(folder, "val.json").read_text())
        corners = {}
        for index, entry in enumerate(content["images"]):
            row, column = divmod(index, columns)
            corners[entry["id"]] = (column * cell, row * cell)
            with Image.open(Path(folder, "val", entry["file_name"])) as image:
                size = (image.width * scale, image.height * scale)
                tile = image.convert("RGB").resize(size, Image.BICUBIC)
            mosaic.paste(tile, corners[entry["id"]])
    for annotation in content["annotations"]:
        (left, top), (x, y, width, height) = corners[annotation["image_id"]], annotation["bbox"]
        box = [left + scale * x, top + scale * y, scale * width, scale * height]
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": 1,
                "category_id": annotation["category_id"],
                "bbox": box,
                "area": annotation["area"] * scale**2,
                "iscrowd": 0,
            }
        )
    content |= {"annotations": annotations}
    content["images"] = [{"id": 1, "file_name": "mosaic.jpg", "width": side, "height": side}]
    return mosaic, content


def average_precision(name: str, instances: Instances) -> float:
    evaluator = DetectionEvaluator(
        name, ("bbox",), distributed=False, max_dets_per_image=max(len(instances), 11)
    )
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": instances}])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()["bbox"]["AP"]


def count_found(content: dict, instances: Instances) -> tuple[int, int]:
    """Return the number of objects that are found, and of detections that are not of an object."""
    drawn = instances[instances.scores >= DRAWN_SCORE]
    boxes = np.array([annotation["bbox"] for annotation in content["annotations"]])
    boxes[:, 2:] += boxes[:, :2]
    kinds = np.array([int(annotation["category_id"]) for annotation in content["annotations"]])
    ids = sorted(category["id"] for category in content["categories"])
    numbers = np.array([ids.index(kind) for kind in kinds])
    overlaps = pairwise_iou(drawn.pred_boxes, Boxes(boxes)).numpy()
    fits = (overlaps >= MIN_IOU) & (drawn.pred_classes.numpy()[:, None] == numbers)
    found, matched = set(), 0
    # Best first; each object once.
    for row, overlap in zip(fits, overlaps):
        free = [index for index in np.flatnonzero(row) if index not in found]
        if free:
            found.add(max(free, key=overlap.__getitem__))
            matched += 1
    return len(found), len(drawn) - matched


def draw_part(pixels: np.ndarray, instances: Instances, corner: int, side: int) -> Image.Image:
    """Return a part of the picture with what was found in it."""
    centres = instances.pred_boxes.get_centers()
    inside = ((centres >= corner) & (centres < corner + side)).all(dim=1)
    shown = instances[inside & (instances.scores >= DRAWN_SCORE)]
    part = Instances((PANEL, PANEL))
    part.pred_boxes = Boxes((shown.pred_boxes.tensor - corner) * (PANEL / side))
    part.scores, part.pred_classes = shown.scores, shown.pred_classes
    cut = Image.fromarray(pixels[corner : corner + side, corner : corner + side])
    return Image.fromarray(draw_detections(np.asarray(cut.resize((PANEL,) * 2)), part, CLASSES))


def before_and_after(mosaic: Image.Image, plain: Instances, sliced: Instances) -> Image.Image:
    """Return the whole picture beside a part of it, without and with slices."""
    side = round(mosaic.width * SHOWN)
    corner = (mosaic.width - side) // 2
    pixels = np.asarray(mosaic)
    whole = mosaic.resize((PANEL, PANEL))
    frame = [corner * PANEL / mosaic.width, (corner + side) * PANEL / mosaic.width]
    ImageDraw.Draw(whole).rectangle([frame[0]] * 2 + [frame[1]] * 2, outline=FRAME, width=3)
    parts = [whole, *(draw_part(pixels, found, corner, side) for found in (plain, sliced))]
    sheet = Image.new("RGB", (3 * PANEL + 2 * GAP, PANEL), "white")
    for index, part in enumerate(parts):
        sheet.paste(part, (index * (PANEL + GAP), 0))
    return sheet


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    # SAHI is an extra; arguments are parsed without it.
    from lite_detr.inference.slices import SlicedDetector

    cli.make_folder(args.output)
    mosaic, content = make_mosaic(args.side, args.scale, args.seed)
    mosaic.save(args.output / "mosaic.jpg", quality=92)
    (args.output / "mosaic.json").write_text(json.dumps(content))
    register_coco("mosaic", args.output / "mosaic.json", args.output, for_evaluation=True)
    pixels = np.asarray(mosaic)
    detector = TrainedDetector(load_trained_config(args.config_file, args.weights), MIN_SCORE)
    sliced = SlicedDetector(detector, args.slice, postprocess_type=args.postprocess)
    results = {}
    for name, predict in (
        ("whole", lambda: detector.drop_unsure(detector.predict_images([pixels])[0])),
        (f"slices of {args.slice}", lambda: sliced.predict_image(pixels, args.batch_size)[0]),
    ):
        start = time.perf_counter()
        results[name] = Result(predict(), time.perf_counter() - start)
    total = len(content["annotations"])
    print(f"{args.side} x {args.side} pixels, {total} objects")
    print("| | AP | found | false | seconds |\n|---|---:|---:|---:|---:|")
    for name, (instances, seconds) in results.items():
        found, false = count_found(content, instances)
        ap = average_precision("mosaic", instances)
        print(f"| {name} | {ap:.1f} | {found / total:.1%} | {false} | {seconds:.1f} |")
    picture = before_and_after(mosaic, *(result.instances for result in results.values()))
    picture.save(args.output / "before_and_after.jpg", quality=85)


if __name__ == "__main__":
    main()
