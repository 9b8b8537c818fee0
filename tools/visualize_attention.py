#!/usr/bin/env python
"""Draw where a detector's attention looks, as figure 5 of the paper does.

    visualize_attention.py --config-file dino/lite_dino_r50_h3l1_2p1x3_36ep.py \\
        --weights output/model_final.pth --input photo.jpg --output output/attention

From left to right: (a) one query with its 100 heaviest sampling locations on all scales, (b) and
(c) the 200 heaviest of all queries on the scales of strides 8 and 16. A second --config-file or a
second --weights adds a row, such as plain attention below key-aware. An image NAME.jpg becomes
DIR/NAME.png and DIR/NAME.pdf. Config overrides follow as key=value, but not directly after --input;
they change all configs. The exit status is 0 if all images were drawn, 1 if one was not or none was
found.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.structures import Instances
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from lite_detr import cli
from lite_detr.analysis.attention_maps import AttentionMap, attention_names, record_attention
from lite_detr.analysis.figures import (
    ModelRow,
    Panel,
    draw_attention,
    find_scale,
    scale_name,
    scale_strides,
)
from lite_detr.errors import LiteDetrError, QueryError, UnknownPartError
from lite_detr.inference.predictor import TrainedDetector, load_trained_config
from lite_detr.modeling import KeyAwareDeformableAttention

SAMPLES_OF_ONE_QUERY = 100
SAMPLES_OF_ALL_QUERIES = 200


class Watcher:
    """Watch one attention of a detector.

    Args:
        name: the detector's name in the figure.
        detector: the model, which also reads the images.
        part: ``encoder`` or ``decoder``.
        layer: of the part, from 0; None is the last.
        strides: of the two scales with a panel each.
        threshold: detections with a lower score are not drawn.

    Raises:
        UnknownPartError: the part has no such layer, or the model no such scale.
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
        """Return the attention's map of one image, and all detections, best first."""
        with record_attention(self.detector.model, [self.attention]) as maps:
            instances = self.detector.predict(inputs)
        return maps[0], instances

    def row(
        self, attention: AttentionMap, instances: Instances, point: tuple[float, float]
    ) -> ModelRow:
        """Return the figure's row.

        Args:
            attention, instances: see :meth:`look`.
            point: in the image's ``[0, 1]`` frame; the query nearest to it is drawn.
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
        return ModelRow(self.title, drawn, self.strides, panels)

    def scale(self, level: int) -> str:
        return scale_name(self.strides[level])


def choose_attention(model: nn.Module, part: str, layer: int | None) -> str:
    """Return the name of the deformable attention of a layer."""
    names = attention_names(model, part)
    if not names:
        raise UnknownPartError(f"the model has no {part} with deformable attention")
    layer = len(names) - 1 if layer is None else layer
    if not 0 <= layer < len(names):
        raise UnknownPartError(
            f"the {part} has no layer {layer}; --layer takes 0 to {len(names) - 1}"
        )
    return names[layer]


def draw_image(
    watchers: Sequence[Watcher], path: Path, query: tuple[float, float] | None
) -> Figure:
    """Draw the figure of an image.

    Args:
        watchers: one for each row.
        path: of the image.
        query: ``(x, y)`` in pixels; None is the centre of the first model's best detection.

    Raises:
        ImageError: the image cannot be read.
        QueryError: the query is outside the image, or there is no detection to take it from.
    """
    images, inputs = zip(*(watcher.detector.read(path) for watcher in watchers))
    looks = [watcher.look(given) for watcher, given in zip(watchers, inputs)]
    height, width = images[0].shape[:2]
    if query is None:
        _, instances = looks[0]
        if not len(instances):
            raise QueryError("nothing is detected there: give a query with --query x,y")
        query = instances.pred_boxes.get_centers()[0].tolist()
    elif not (0 <= query[0] <= width and 0 <= query[1] <= height):
        x, y = query
        raise QueryError(f"query {x:g},{y:g} is outside its {width} x {height} pixels")
    point = tuple(np.divide(query, (width, height)).tolist())
    rows = [watcher.row(*look, point) for watcher, look in zip(watchers, looks)]
    return draw_attention(images[0], rows, watchers[0].detector.metadata)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    cli.add_config_file(
        parser, action="append", help="a file or a model zoo name; twice for two rows"
    )
    add = parser.add_argument
    add(
        "--weights",
        action="append",
        metavar="FILE",
        help="weights of the trained detector, one for each row; sets train.init_checkpoint",
    )
    add("--input", required=True, nargs="+", help="images, patterns such as '*.jpg', or folders")
    add("--output", required=True, type=cli.folder, metavar="DIR", help="created if needed")
    add("--part", choices=("encoder", "decoder"), default="encoder", help="default: %(default)s")
    add("--layer", type=int, metavar="N", help="layer of the part, from 0 (default: the last)")
    add(
        "--query",
        type=cli.point,
        metavar="X,Y",
        help="in pixels of the image (default: the centre of the first model's best detection)",
    )
    add(
        "--strides",
        type=int,
        nargs=2,
        default=(8, 16),
        metavar="N",
        help="strides of the scales of (b) and (c) (default: 8 16)",
    )
    add(
        "--confidence-threshold",
        type=cli.score,
        default=0.3,
        metavar="SCORE",
        help="detections with a lower score are not drawn (default: %(default)s)",
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
    """Load the models of the command line; see :func:`load_trained_config` for the errors."""
    watchers = []
    for config_file, weights in zip(args.config_file, args.weights or [None] * 2):
        cfg = load_trained_config(config_file, weights, args.opts)
        # The best detection gives the query, even if it is not drawn.
        detector = TrainedDetector(cfg, threshold=0.0)
        name = f"{Path(config_file).stem}, {Path(cfg.train.init_checkpoint).stem}"
        watchers.append(
            Watcher(name, detector, args.part, args.layer, args.strides, args.confidence_threshold)
        )
    return watchers


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Draw the figures and return the exit status."""
    args = parse_args(argv)
    images, missing = cli.find_images(args.input, exclude=args.output)
    for text in missing:
        print(f"{text}: skipped, as it names no image", file=sys.stderr)
    if not images:
        return 1
    cli.make_folder(args.output)
    watchers = make_watchers(args)
    pictures = []
    bar = tqdm(images, unit="image", disable=None)
    for image, picture in zip(bar, cli.picture_paths(images, args.output)):
        try:
            figure = draw_image(watchers, image, args.query)
        except LiteDetrError as error:
            tqdm.write(f"{image}: skipped: {error}", file=sys.stderr)
            continue
        figure.savefig(picture, dpi=110)
        figure.savefig(picture.with_suffix(".pdf"))
        pictures.append(picture)
    num_failures = len(missing) + len(images) - len(pictures)
    print(f"figures: {len(pictures)}, failures: {num_failures}; they are in {args.output}")
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
