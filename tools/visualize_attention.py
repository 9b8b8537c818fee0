#!/usr/bin/env python
"""Draw where a detector's attention looks, as figure 5 of the paper does.

    visualize_attention.py --config-file dino/lite_dino_r50_h3l1_2p1x3_36ep.py \\
        --weights output/model_final.pth --input photo.jpg --output output/attention

From left to right: (a) one query with its 100 heaviest sampling locations on all scales, (b) and
(c) the 200 heaviest of all queries on the scales of strides 8 and 16. A second --config-file and
--weights make a second row, such as plain attention beside key-aware. An image NAME.jpg becomes
DIR/NAME.png and DIR/NAME.pdf. Options follow as key=value, though not right after --input; they
change all configs. The exit status is 0 if all images were drawn, 1 if one was not or none was
found.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from attention_figure import Panel, Row, draw_attention
from detectron2.structures import Instances
from feature_scales import UnknownScale, find_scale, scale_name, scale_strides
from matplotlib.figure import Figure
from tqdm import tqdm

from lite_detr import cli, model_zoo
from lite_detr.analysis.attention_maps import (
    AttentionMap,
    UnknownAttention,
    attention_names,
    record_attention,
)
from lite_detr.checkpoint import WeightsError
from lite_detr.data.coco import DatasetError
from lite_detr.data.image_files import ImageError
from lite_detr.inference.predictor import TrainedDetector, load_trained_config
from lite_detr.modeling import KeyAwareDeformableAttention

SAMPLES_OF_ONE_QUERY = 100
SAMPLES_OF_ALL_QUERIES = 200


class UndrawableImage(ValueError):
    """There is nothing to draw on an image; the message says why."""


class Watcher:
    """A detector, one of whose attentions is watched.

    Args:
        name: what the figure calls it.
        detector: the model with its reader of images.
        part: ``encoder`` or ``decoder``.
        layer: of the part, from 0; None takes the last.
        strides: of the two scales that are drawn on their own.
        threshold: detections scored lower are not drawn.

    Raises:
        UnknownAttention: the part has no such layer.
        UnknownScale: the model has no such scale.
    """

    def __init__(
        self,
        name: str,
        detector: TrainedDetector,
        part: str,
        layer: int | None,
        strides: Sequence[int],
        threshold: float,
    ):
        self.detector = detector
        self.threshold = threshold
        self.attention = choose_attention(detector.model, part, layer)
        self.strides = scale_strides(detector.model)
        self.levels = [find_scale(self.strides, stride) for stride in strides]
        module = detector.model.get_submodule(self.attention)
        kind = "key-aware" if isinstance(module, KeyAwareDeformableAttention) else "plain"
        self.title = f"{name}: {kind} attention, {self.attention}"

    def look(self, inputs: dict) -> tuple[AttentionMap, Instances]:
        """The attention's map of one image, and all detections, best first."""
        with record_attention(self.detector.model, [self.attention]) as maps:
            instances = self.detector.predict(inputs)
        return maps[0], instances

    def row(self, attention: AttentionMap, instances: Instances, point: tuple[float, float]) -> Row:
        """The figure's row.

        Args:
            attention, instances: see :meth:`look`.
            point: whose nearest query is drawn, in the image's ``[0, 1]`` frame.
        """
        query = attention.nearest_query(point)
        level = attention.level_of(query)
        kind = "one query" if level is None else f"one query, of {self.scale(level)}"
        samples = attention.strongest(SAMPLES_OF_ONE_QUERY, query=query)
        title = f"(a) {kind}: top {len(samples.weights)} on all scales"
        panels = [Panel(title, samples, attention.point_of(query))]
        for letter, level in zip("bc", self.levels):
            samples = attention.strongest(SAMPLES_OF_ALL_QUERIES, level=level)
            title = f"({letter}) all queries: top {len(samples.weights)} on {self.scale(level)}"
            panels.append(Panel(title, samples))
        drawn = instances[instances.scores >= self.threshold]
        return Row(self.title, drawn, self.strides, panels)

    def scale(self, level: int) -> str:
        return scale_name(self.strides[level])


def choose_attention(model: torch.nn.Module, part: str, layer: int | None) -> str:
    """The name of the deformable attention of a layer."""
    names = attention_names(model, part)
    layer = len(names) - 1 if layer is None else layer
    if not 0 <= layer < len(names):
        raise UnknownAttention(
            f"the {part} has no layer {layer}; --layer takes 0 to {len(names) - 1}"
        )
    return names[layer]


def draw_image(
    watchers: Sequence[Watcher], path: Path, query: tuple[float, float] | None
) -> Figure:
    """The figure of an image.

    Args:
        query: ``(x, y)`` in pixels; None takes the centre of the first model's best detection.

    Raises:
        UndrawableImage: it cannot be read, the query lies outside, or there is no detection to
            take one from.
    """
    try:
        images, inputs = zip(*(watcher.detector.read(path) for watcher in watchers))
    except ImageError as error:
        raise UndrawableImage(str(error)) from error
    looks = [watcher.look(given) for watcher, given in zip(watchers, inputs)]
    height, width = images[0].shape[:2]
    if query is None:
        _, instances = looks[0]
        if not len(instances):
            raise UndrawableImage("nothing is detected there: give a query with --query x,y")
        query = instances.pred_boxes.get_centers()[0].tolist()
    elif not (0 <= query[0] <= width and 0 <= query[1] <= height):
        x, y = query
        raise UndrawableImage(f"query {x:g},{y:g} is outside its {width} x {height} pixels")
    point = tuple(np.divide(query, (width, height)).tolist())
    rows = [watcher.row(*look, point) for watcher, look in zip(watchers, looks)]
    return draw_attention(images[0], rows, watchers[0].detector.metadata)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--config-file",
        required=True,
        action="append",
        metavar="C",
        help="a file or a name of the model zoo; twice for two rows",
    )
    add(
        "--weights",
        action="append",
        metavar="FILE",
        help="of the trained detector, one for each row; sets train.init_checkpoint",
    )
    add("--input", required=True, nargs="+", help="images, patterns such as '*.jpg', or folders")
    add("--output", required=True, type=cli.folder, metavar="DIR", help="made if need be")
    add("--part", choices=("encoder", "decoder"), default="encoder", help="default: %(default)s")
    add("--layer", type=int, metavar="N", help="of the part, from 0 (default: the last)")
    add(
        "--query",
        type=cli.point,
        metavar="X,Y",
        help="in the image's pixels (default: the centre of the first model's best detection)",
    )
    add(
        "--strides",
        type=int,
        nargs=2,
        default=(8, 16),
        metavar="N",
        help="of the scales of (b) and (c) (default: 8 16)",
    )
    add(
        "--confidence-threshold",
        type=cli.score,
        default=0.3,
        metavar="SCORE",
        help="detections scored lower are not drawn (default: %(default)s)",
    )
    cli.add_overrides(parser)
    args = parser.parse_intermixed_args(argv)
    rows = max(len(args.config_file), len(args.weights or []))
    if rows > 2:
        parser.error(f"a figure has one row or two, not {rows}: give --config-file at most twice")
    if len(args.config_file) == 1:
        args.config_file *= rows
    if args.weights and len(args.weights) != rows:
        parser.error(
            f"{rows} config files, but {len(args.weights)} weights: give --weights for each"
        )
    return args


def make_watchers(args: argparse.Namespace) -> list[Watcher]:
    """The models of the command line; see ``load_trained_config`` for what it raises."""
    watchers = []
    for config_file, weights in zip(args.config_file, args.weights or [None] * 2):
        cfg = load_trained_config(config_file, weights, args.opts)
        # The best detection tells the query, drawn or not.
        detector = TrainedDetector(cfg, threshold=0.0)
        name = f"{Path(config_file).stem}, {Path(cfg.train.init_checkpoint).stem}"
        watchers.append(
            Watcher(name, detector, args.part, args.layer, args.strides, args.confidence_threshold)
        )
    return watchers


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the figures and returns the exit status."""
    args = parse_args(argv)
    images, missing = cli.find_images(args.input)
    for text in missing:
        print(f"{text}: skipped, as it gives no image", file=sys.stderr)
    if not images:
        return 1
    try:
        watchers = make_watchers(args)
    except (
        FileNotFoundError,
        model_zoo.ConfigError,
        DatasetError,
        WeightsError,
        UnknownAttention,
        UnknownScale,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    args.output.mkdir(parents=True, exist_ok=True)
    pictures = []
    bar = tqdm(images, unit="image", disable=None)
    for image, picture in zip(bar, cli.picture_paths(images, args.output)):
        try:
            figure = draw_image(watchers, image, args.query)
        except UndrawableImage as error:
            tqdm.write(f"{image}: skipped: {error}", file=sys.stderr)
            continue
        figure.savefig(picture, dpi=110)
        figure.savefig(picture.with_suffix(".pdf"))
        plt.close(figure)
        pictures.append(picture)
    num_failures = len(missing) + len(images) - len(pictures)
    print(f"figures: {len(pictures)}, failures: {num_failures}; they are in {args.output}")
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
