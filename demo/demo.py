#!/usr/bin/env python
"""Run a detector over images: draw its detections, write them to a JSON file, or both.

    demo.py --config-file digits/lite_deformable_detr_efficientnet_lite0.py \\
        --weights output/model_final.pth --input datasets/digits/val --output output/demo

An image NAME.jpg becomes DIR/NAME.png, or DIR/NAME_2.png and so on if that name is taken. --json
FILE writes the detections for other programs; without --output nothing is drawn, which saves most
of the time. Config overrides follow as key=value, but not right after --input, which would take
them for images. The exit status is 0 if all images were read, and 1 if one was not or none was
found.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from detectron2.utils.visualizer import Visualizer
from omegaconf import DictConfig
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from lite_detr import cli
from lite_detr.errors import ImageError
from lite_detr.inference import DTYPES
from lite_detr.inference.predictor import FilePrediction, TrainedDetector, load_trained_config
from lite_detr.labels import matplotlib_metadata, missing_glyphs, printable, shorten

MAX_TILES = 24
MAX_COLUMNS = 6
TILE_SIDE = 320  # px
CAPTION_HEIGHT = 24  # px
GAP = 8  # px, around every tile
FONT_SIZE = 16  # px

SHEET_COLOUR = (255, 255, 255)
TILE_COLOUR = (224, 224, 224)
CAPTION_COLOUR = (0, 0, 0)


class DetectionFile:
    """A JSON list with one object, and one line, for each image.

    An image has ``file_name``, ``height``, ``width`` and ``detections``, best first, each with
    ``class``, ``score`` and ``box``: x1, y1, x2, y2 in pixels. A file that cannot be used has a
    ``problem`` instead. Lines are written one by one and the list is always closed, so that the
    results of an interrupted run can be read.

    Args:
        path: of the file; its folder is created, and an earlier file is replaced.
        classes: names by number; None writes the numbers.

    Raises:
        SaveError: the file cannot be written.
    """

    def __init__(self, path: Path, classes: Sequence[str] | None):
        cli.make_file(path)
        self.file = path.open("w", encoding="utf-8")
        self.classes = classes
        self.separator = "[\n"

    def __enter__(self) -> "DetectionFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.file.write("[]\n" if self.separator == "[\n" else "\n]\n")
        self.file.close()

    def add(self, prediction: FilePrediction) -> None:
        entry = self._entry(prediction)
        line = json.dumps(entry, ensure_ascii=False)
        # Bytes that are not UTF-8 in the name of a file, which os.fsencode restores.
        if any("\ud800" <= character <= "\udfff" for character in line):
            line = json.dumps(entry)
        self.file.write(self.separator + line)
        self.separator = ",\n"

    def _entry(self, prediction: FilePrediction) -> dict:
        entry: dict = {"file_name": str(prediction.path)}
        instances = prediction.instances
        if instances is None:
            return entry | {"problem": prediction.problem}
        entry["height"], entry["width"] = instances.image_size
        entry["detections"] = [
            {
                "class": number if self.classes is None else self.classes[number],
                "score": round(score, 5),
                "box": [round(corner, 2) for corner in box],
            }
            for number, score, box in zip(
                instances.pred_classes.tolist(),
                instances.scores.tolist(),
                instances.pred_boxes.tensor.tolist(),
            )
        ]
        return entry


def draw(detector: TrainedDetector, prediction: FilePrediction, path: Path) -> None:
    """Draw the detections of an image and save the picture."""
    metadata = matplotlib_metadata(detector.metadata)
    visualizer = Visualizer(detector.read_rgb(prediction.path), metadata)
    with missing_glyphs():
        visualizer.draw_instance_predictions(prediction.instances).save(str(path))


def contact_sheet(paths: Sequence[str | Path]) -> Image.Image:
    """Return the first ``MAX_TILES`` pictures in rows of equal tiles, each above its file name.

    A picture is scaled to fill its tile in one direction; its aspect ratio is kept.

    Args:
        paths: at least one picture.
    """
    if not paths:
        raise ValueError("a contact sheet needs at least one picture, but none was given")
    paths = [Path(path) for path in paths[:MAX_TILES]]
    rows = math.ceil(len(paths) / MAX_COLUMNS)
    columns = math.ceil(len(paths) / rows)
    step_x, step_y = TILE_SIDE + GAP, TILE_SIDE + CAPTION_HEIGHT + GAP
    sheet = Image.new("RGB", (GAP + columns * step_x, GAP + rows * step_y), SHEET_COLOUR)
    canvas = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    for index, path in enumerate(paths):
        row, column = divmod(index, columns)
        x, y = GAP + column * step_x, GAP + row * step_y
        with Image.open(path) as picture:
            tile = ImageOps.pad(picture.convert("RGB"), (TILE_SIDE, TILE_SIDE), color=TILE_COLOUR)
        sheet.paste(tile, (x, y))
        middle = (x + TILE_SIDE / 2, y + TILE_SIDE + CAPTION_HEIGHT / 2)
        canvas.text(middle, shorten(path.name, font, TILE_SIDE), CAPTION_COLOUR, font, anchor="mm")
    return sheet


def record_all(
    predictions: Iterable[FilePrediction],
    detector: TrainedDetector,
    pictures: Iterator[Path] | None,
    detection_file: DetectionFile | None,
) -> tuple[int, int, list[Path]]:
    """Draw and write the predictions, and name the unusable images on stderr.

    Args:
        predictions: of all images.
        detector: the one that made them.
        pictures: the path of each image's picture; None draws none.
        detection_file: receives all images; None writes none.

    Returns:
        The number of usable images, the number of their detections, and the pictures drawn.
    """
    num_images, num_detections, drawn = 0, 0, []
    for prediction in predictions:
        picture = next(pictures) if pictures else None
        if prediction.problem is None and picture:
            try:
                draw(detector, prediction, picture)
                drawn.append(picture)
            except ImageError as error:  # gone since it was predicted
                prediction = FilePrediction(prediction.path, problem=str(error))
        if detection_file:
            detection_file.add(prediction)
        if prediction.problem is not None:
            name = printable(prediction.path)
            tqdm.write(f"{name}: skipped: {prediction.problem}", file=sys.stderr)
            continue
        num_images += 1
        num_detections += len(prediction.instances)
    return num_images, num_detections, drawn


def default_workers(cfg: DictConfig) -> int:
    """Return the number of the test loader's workers, limited to the number of cores."""
    return min(cfg.dataloader.test.get("num_workers", 0), os.cpu_count() or 1)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_config_file(parser)
    add("--input", required=True, nargs="+", help="images, patterns such as '*.jpg', or folders")
    add("--output", type=cli.folder, metavar="DIR", help="for pictures; created if need be")
    add(
        "--json",
        type=cli.file_name(".json"),
        metavar="FILE.json",
        help="write the classes, scores and boxes of all images",
    )
    add("--weights", metavar="FILE", help="of the trained detector; sets train.init_checkpoint")
    add(
        "--confidence-threshold",
        type=cli.score,
        default=0.3,
        metavar="SCORE",
        help="drop detections with a lower score (default: %(default)s)",
    )
    add(
        "--contact-sheet",
        type=cli.file_name(".png"),
        metavar="FILE.png",
        help=f"also put the first {MAX_TILES} pictures on one sheet",
    )
    add(
        "--batch-size",
        type=cli.whole_number(1),
        default=1,
        metavar="N",
        help="images of the same size to predict at once (default: %(default)s)",
    )
    add(
        "--workers",
        type=cli.whole_number(0),
        metavar="N",
        help="processes that read images ahead (default: as in the config's test loader)",
    )
    add(
        "--optimize",
        choices=DTYPES,
        metavar="DTYPE",
        help=f"run faster: lite_detr.optimize_for_inference, in {', '.join(DTYPES)}",
    )
    cli.add_overrides(parser)
    args = parser.parse_intermixed_args(argv)
    if not args.output and not args.json:
        parser.error("nothing to write: give --output DIR for pictures, --json FILE.json, or both")
    if args.contact_sheet and not args.output:
        parser.error("--contact-sheet shows the pictures: give --output DIR for them")
    return args


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    args = parse_args(argv)
    images, missing = cli.find_images(args.input)
    for text in missing:
        print(
            f"{printable(text)}: skipped, as it is not a file, a pattern of files or a folder with "
            f"images ({', '.join(cli.IMAGE_SUFFIXES)})",
            file=sys.stderr,
        )
    if not images:
        return 1
    for path in filter(None, (args.json, args.contact_sheet)):
        cli.make_file(path)
    if args.output:
        cli.make_folder(args.output)
    cfg = load_trained_config(args.config_file, args.weights, args.opts)
    detector = TrainedDetector(cfg, args.confidence_threshold, args.optimize)

    num_workers = default_workers(cfg) if args.workers is None else args.workers
    predictions = detector.predict_files(images, args.batch_size, num_workers)
    bar = tqdm(predictions, total=len(images), unit="image")
    written, pictures, detection_file = [], None, None
    with contextlib.ExitStack() as stack:
        if args.output:
            pictures = cli.picture_paths(images, args.output)
            written.append(f"pictures are in {printable(args.output)}")
        if args.json:
            classes = detector.metadata.thing_classes if detector.metadata else None
            detection_file = stack.enter_context(DetectionFile(args.json, classes))
            written.append(f"detections are in {printable(args.json)}")
        num_images, num_detections, drawn = record_all(bar, detector, pictures, detection_file)
    if args.contact_sheet and drawn:
        contact_sheet(drawn).save(args.contact_sheet)
    num_failures = len(missing) + len(images) - num_images
    print(
        f"images: {num_images}, detections: {num_detections}, failures: {num_failures}; "
        f"{', '.join(written)}"
    )
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
