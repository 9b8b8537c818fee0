#!/usr/bin/env python
"""Draw a detector's predictions on images, with Detectron2's visualizer.

    demo.py --config-file digits/lite_deformable_detr_efficientnet_lite0.py \\
        --weights output/model_final.pth --input datasets/digits/val --output output/demo

An image NAME.jpg becomes DIR/NAME.png; where that is taken, DIR/NAME_2.png and so on. Options
follow as key=value, though not right after --input, which would take them for images. The exit
status is 0 if all images were read, 1 if one was not or none was found.
"""

import argparse
import glob
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from contact_sheet import MAX_TILES, contact_sheet
from detectron2.config import LazyConfig, instantiate
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.data.transforms import AugInput
from detectron2.structures import Instances
from detectron2.utils.visualizer import VisImage, Visualizer
from omegaconf import DictConfig
from tqdm import tqdm

from lite_detr import model_zoo
from lite_detr.checkpoint import DetrCheckpointer, WeightsError
from lite_detr.data.coco import DatasetError, apply_data_config
from lite_detr.data.image_files import UnusableImage, read_image

# What a folder is searched for; a file named on the command line may be of any kind.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Demo:
    """A trained detector that reads, predicts and draws single images.

    Args:
        cfg: lazy config; ``train.init_checkpoint`` gives the weights.
        threshold: detections scored lower are dropped.
    """

    def __init__(self, cfg: DictConfig, threshold: float):
        mapper = instantiate(cfg.dataloader.test.mapper)
        self.augmentations, self.image_format = mapper.augmentations, mapper.image_format
        self.metadata = class_metadata(cfg)
        self.threshold = threshold
        self.model = instantiate(cfg.model).to(cfg.train.device).eval()
        DetrCheckpointer(self.model).load(cfg.train.init_checkpoint)

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
        instances = self.model([inputs])[0]["instances"].to("cpu")
        return instances[instances.scores >= self.threshold]

    def draw(self, image: np.ndarray, instances: Instances) -> VisImage:
        return Visualizer(image, self.metadata).draw_instance_predictions(instances)


def class_metadata(cfg: DictConfig) -> Metadata | None:
    """The metadata of the config's test set, which names the classes.

    None, with which Detectron2 writes class numbers, if it does not name as many as the model has.
    """
    names = cfg.dataloader.test.dataset.names
    for name in [names] if isinstance(names, str) else names or []:
        metadata = MetadataCatalog.get(name)
        if len(metadata.get("thing_classes", [])) == cfg.model.num_classes:
            return metadata
    return None


def load_config(args: argparse.Namespace) -> DictConfig:
    """The config with the command line's options applied.

    Raises:
        FileNotFoundError: there is no such config.
        ConfigError: it is a YAML file.
        DatasetError: ``data`` is given and broken.
        WeightsError: neither the command line nor the config gives weights.
    """
    cfg = LazyConfig.apply_overrides(model_zoo.get_config(args.config_file), args.opts)
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


def draw_all(demo: Demo, images: Sequence[Path], folder: Path) -> tuple[list[Path], int]:
    """Writes the pictures of all images that can be read, and names the others on stderr.

    Returns:
        The pictures' paths, and how many detections they show.
    """
    pictures, num_detections = [], 0
    for image, picture in zip(tqdm(images, unit="image"), picture_paths(images, folder)):
        try:
            pixels, inputs = demo.read(image)
        except UnusableImage as error:
            tqdm.write(f"{image}: skipped: {error}", file=sys.stderr)
            continue
        instances = demo.predict(inputs)
        demo.draw(pixels, instances).save(str(picture))
        pictures.append(picture)
        num_detections += len(instances)
    return pictures, num_detections


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="C", help="a file or a name of the model zoo")
    add("--input", required=True, nargs="+", help="images, patterns such as '*.jpg', or folders")
    add("--output", required=True, type=folder, metavar="DIR", help="made if need be")
    add("--weights", metavar="FILE", help="of the trained detector; sets train.init_checkpoint")
    add(
        "--confidence-threshold",
        type=score,
        default=0.3,
        metavar="SCORE",
        help="detections scored lower are not drawn (default: %(default)s)",
    )
    add(
        "--contact-sheet",
        type=png_file,
        metavar="FILE.png",
        help=f"besides, put the first {MAX_TILES} pictures on one",
    )
    add("opts", nargs="*", type=option, metavar="key=value", help="change the config's values")
    return parser.parse_intermixed_args(argv)


def folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; give a folder")
    return path


def score(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"given {text}, accepted are numbers from 0 to 1")
    return value


def png_file(text: str) -> Path:
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"given {text}, accepted are names that end in .png")
    return Path(text)


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
        demo = Demo(load_config(args), args.confidence_threshold)
    except (FileNotFoundError, model_zoo.ConfigError, DatasetError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    args.output.mkdir(parents=True, exist_ok=True)
    pictures, num_detections = draw_all(demo, images, args.output)
    if args.contact_sheet and pictures:
        args.contact_sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(pictures).save(args.contact_sheet)
    num_failures = len(missing) + len(images) - len(pictures)
    print(
        f"images: {len(pictures)}, detections: {num_detections}, failures: {num_failures}; "
        f"pictures are in {args.output}"
    )
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
