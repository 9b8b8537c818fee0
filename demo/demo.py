#!/usr/bin/env python
"""Run a detector over images: pictures by Detectron2's visualizer, or a JSON file, or both.

    demo.py --config-file digits/lite_deformable_detr_efficientnet_lite0.py \\
        --weights output/model_final.pth --input datasets/digits/val --output output/demo

An image NAME.jpg becomes DIR/NAME.png; where that is taken, DIR/NAME_2.png and so on. --json FILE
writes detections for programs, and without --output, nothing is drawn, which takes longer than all
else. Options follow as key=value, though not right after --input, which would take them for images.
The exit status is 0 if all images were read, 1 if one was not or none was found.
"""

import argparse
import contextlib
import dataclasses
import glob
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from contact_sheet import MAX_TILES, contact_sheet
from detection_file import DetectionFile
from detectron2.config import instantiate
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.data.transforms import AugInput
from detectron2.structures import Instances
from detectron2.utils.visualizer import VisImage, Visualizer
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

from lite_detr import model_zoo, overrides
from lite_detr.checkpoint import DetrCheckpointer, WeightsError
from lite_detr.data.coco import DatasetError, apply_data_config, class_metadata
from lite_detr.data.image_files import ImageError, read_image
from lite_detr.inference import DTYPES, OptimizationError, optimize_for_program
from lite_detr.inference.predictor import BatchPredictor, FilePrediction

# What a folder is searched for; a file named on the command line may be of any kind.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Demo:
    """A trained detector that reads, predicts and draws images.

    Args:
        cfg: lazy config; ``train.init_checkpoint`` gives the weights.
        threshold: detections scored lower are dropped.
        optimize: name of a dtype for :func:`lite_detr.optimize_for_inference`; None does without.
    """

    def __init__(self, cfg: DictConfig, threshold: float, optimize: str | None = None):
        mapper = instantiate(cfg.dataloader.test.mapper)
        self.augmentations, self.image_format = mapper.augmentations, mapper.image_format
        self.metadata = class_metadata(cfg)
        self.threshold = threshold
        self.model = build_model(cfg)
        if optimize:
            self.model = optimize_for_program(self.model, optimize)

    def read(self, path: Path) -> tuple[np.ndarray, dict]:
        """The RGB image ``[H, W, 3]``, and the model's input as the test set's mapper makes it."""
        image = read_image(str(path), self.image_format)
        augmented = AugInput(image)
        self.augmentations(augmented)
        chw = np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
        height, width = image.shape[:2]
        inputs = {"image": torch.as_tensor(chw), "height": height, "width": width}
        return convert_image_to_rgb(image, self.image_format), inputs

    @torch.no_grad()
    def predict(self, inputs: dict) -> Instances:
        return self.confident(self.model([inputs])[0]["instances"].to("cpu"))

    def predict_files(
        self, images: Sequence[Path], batch_size: int, num_workers: int
    ) -> Iterator[FilePrediction]:
        """What becomes of each image, in order; see :class:`BatchPredictor`."""
        predictor = BatchPredictor(
            self.model, [self.augmentations], self.image_format, batch_size, num_workers
        )
        for prediction in predictor(images):
            if prediction.instances is not None:
                instances = self.confident(prediction.instances)
                prediction = dataclasses.replace(prediction, instances=instances)
            yield prediction

    def confident(self, instances: Instances) -> Instances:
        return instances[instances.scores >= self.threshold]

    def draw(self, image: np.ndarray, instances: Instances) -> VisImage:
        return Visualizer(image, self.metadata).draw_instance_predictions(instances)

    def draw_file(self, path: Path, instances: Instances) -> VisImage:
        image = read_image(str(path), self.image_format)
        return self.draw(convert_image_to_rgb(image, self.image_format), instances)


def build_model(cfg: DictConfig) -> nn.Module:
    """The config's detector, with the weights of ``train.init_checkpoint``, for inference."""
    model = instantiate(cfg.model).to(cfg.train.device).eval()
    DetrCheckpointer(model).load(cfg.train.init_checkpoint)
    return model


def load_config(args: argparse.Namespace) -> DictConfig:
    """The config with the command line's options applied.

    Raises:
        FileNotFoundError: there is no such config.
        ConfigError: it is a YAML file, or an option does not fit it.
        DatasetError: ``data`` is given and broken.
        WeightsError: neither the command line nor the config gives weights.
    """
    cfg = overrides.load_config(args.config_file, args.opts)
    apply_data_config(cfg, splits=("test",))
    if args.weights:
        cfg.train.init_checkpoint = args.weights
    if not cfg.train.init_checkpoint:
        raise WeightsError(
            f"config {args.config_file} names no weights: give those of a trained detector with "
            "--weights FILE"
        )
    return cfg


def find_images(given: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The images that files, patterns and folders give, each once, and what gives none."""
    found = {text: expand(text) for text in given}
    images = dict.fromkeys(itertools.chain.from_iterable(found.values()))
    return list(images), [text for text, paths in found.items() if not paths]


def expand(text: str) -> list[Path]:
    path = Path(text)
    if path.is_dir():
        files = (entry for entry in path.iterdir() if entry.is_file())
        return sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)
    # Before it is taken for a pattern, as names may hold brackets.
    if path.is_file():
        return [path]
    return sorted(match for match in map(Path, glob.glob(text)) if match.is_file())


def picture_paths(images: Sequence[Path], folder: Path) -> Iterator[Path]:
    """Where each image's picture goes: never onto another's, nor onto one of the images."""
    taken = {image.resolve() for image in images}
    for image in images:
        numbered = (f"{image.stem}_{number}.png" for number in itertools.count(2))
        names = itertools.chain([f"{image.stem}.png"], numbered)
        path = next(folder / name for name in names if (folder / name).resolve() not in taken)
        taken.add(path.resolve())
        yield path


def default_workers(cfg: DictConfig) -> int:
    """As many as the config's test loader has, and no more than there are cores."""
    return min(cfg.dataloader.test.get("num_workers", 0), os.cpu_count() or 1)


def record_all(
    predictions: Iterable[FilePrediction],
    demo: Demo,
    pictures: Iterator[Path] | None,
    detection_file: DetectionFile | None,
) -> tuple[int, int, list[Path]]:
    """Draws and writes what becomes of the images, and names on stderr those that are unusable.

    Args:
        predictions: of all images.
        demo: what draws.
        pictures: where each image's picture goes; None draws none.
        detection_file: for all images; None writes none.

    Returns:
        The numbers of images that could be used and of their detections, and the pictures.
    """
    num_images, num_detections, drawn = 0, 0, []
    for prediction in predictions:
        picture = next(pictures) if pictures else None
        if prediction.problem is None and picture:
            try:
                demo.draw_file(prediction.path, prediction.instances).save(str(picture))
                drawn.append(picture)
            except ImageError as error:  # gone since it was predicted
                prediction = FilePrediction(prediction.path, problem=str(error))
        if detection_file:
            detection_file.add(prediction)
        if prediction.problem is not None:
            tqdm.write(f"{prediction.path}: skipped: {prediction.problem}", file=sys.stderr)
            continue
        num_images += 1
        num_detections += len(prediction.instances)
    return num_images, num_detections, drawn


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="C", help="a file or a name of the model zoo")
    add("--input", required=True, nargs="+", help="images, patterns such as '*.jpg', or folders")
    add("--output", type=folder, metavar="DIR", help="for pictures; made if need be")
    add(
        "--json",
        type=file(".json"),
        metavar="FILE.json",
        help="for the classes, scores and boxes of all images",
    )
    add("--weights", metavar="FILE", help="of the trained detector; sets train.init_checkpoint")
    add(
        "--confidence-threshold",
        type=score,
        default=0.3,
        metavar="SCORE",
        help="detections scored lower are left out (default: %(default)s)",
    )
    add(
        "--contact-sheet",
        type=file(".png"),
        metavar="FILE.png",
        help=f"besides, put the first {MAX_TILES} pictures on one",
    )
    add(
        "--batch-size",
        type=at_least(1),
        default=1,
        metavar="N",
        help="images of one size that are predicted at once (default: %(default)s)",
    )
    add(
        "--workers",
        type=at_least(0),
        metavar="N",
        help="processes that read images ahead (default: as the config's test loader has)",
    )
    add(
        "--optimize",
        choices=DTYPES,
        metavar="DTYPE",
        help=f"run faster: lite_detr.optimize_for_inference, in {', '.join(DTYPES)}",
    )
    add("opts", nargs="*", type=option, metavar="key=value", help="change the config's values")
    args = parser.parse_intermixed_args(argv)
    if not args.output and not args.json:
        parser.error("nothing to write: give --output DIR for pictures, --json FILE.json, or both")
    if args.contact_sheet and not args.output:
        parser.error("--contact-sheet is made of the pictures: give --output DIR for them")
    return args


def folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; give a folder")
    return path


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"given {text}, accepted are whole numbers from {least} on"
            )
        return value

    return number


def score(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"given {text}, accepted are numbers from 0 to 1")
    return value


def file(suffix: str) -> Callable[[str], Path]:
    def path(text: str) -> Path:
        if Path(text).suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(
                f"given {text}, accepted are names that end in {suffix}"
            )
        return Path(text)

    return path


def option(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"given {text}, accepted are options like key=value")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and returns its exit status."""
    args = parse_args(argv)
    images, missing = find_images(args.input)
    for text in missing:
        print(
            f"{text}: skipped, as it is no file, no pattern of files and no folder with images "
            f"({', '.join(IMAGE_SUFFIXES)})",
            file=sys.stderr,
        )
    if not images:
        return 1
    try:
        cfg = load_config(args)
        demo = Demo(cfg, args.confidence_threshold, args.optimize)
    except (
        FileNotFoundError,
        model_zoo.ConfigError,
        DatasetError,
        OptimizationError,
        WeightsError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    num_workers = default_workers(cfg) if args.workers is None else args.workers
    predictions = demo.predict_files(images, args.batch_size, num_workers)
    bar = tqdm(predictions, total=len(images), unit="image")
    written, pictures, detection_file = [], None, None
    with contextlib.ExitStack() as stack:
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            pictures = picture_paths(images, args.output)
            written.append(f"pictures are in {args.output}")
        if args.json:
            classes = demo.metadata.thing_classes if demo.metadata else None
            detection_file = stack.enter_context(DetectionFile(args.json, classes))
            written.append(f"detections are in {args.json}")
        num_images, num_detections, drawn = record_all(bar, demo, pictures, detection_file)
    if args.contact_sheet and drawn:
        args.contact_sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(drawn).save(args.contact_sheet)
    num_failures = len(missing) + len(images) - num_images
    print(
        f"images: {num_images}, detections: {num_detections}, failures: {num_failures}; "
        f"{', '.join(written)}"
    )
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
