#!/usr/bin/env python
"""Draw the multi-scale tokens of an image, and how often encoders update those of each scale.

    visualize_tokens.py --input photo.jpg --output output/tokens

An image NAME.jpg becomes DIR/NAME.png and DIR/NAME.pdf: its cells on each scale, their share of all
tokens, and a chart for each encoder, in which areas are updates of tokens. The encoders are those
of --config-file, which may be given several times; without it, the full encoder and the paper's
lite ones. The first config sets the image's size and scales. No weights are needed. Config
overrides follow as key=value, but not directly after --input; they change all configs. The exit
status is 0 if all images were drawn, 1 if one was not or none was found.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig
from tqdm import tqdm

from lite_detr import cli
from lite_detr.analysis.figures import EncoderUpdates, TokenGrid, draw_tokens, scale_strides
from lite_detr.analysis.token_updates import count_updates, make_grids
from lite_detr.data.image_files import read_image
from lite_detr.errors import ConfigError, LiteDetrError
from lite_detr.overrides import load_config

CONFIGS = [
    f"deformable_detr/{name}_50ep.py"
    for name in (
        "deformable_detr_r50_single_stage",
        "lite_deformable_detr_r50_h3l1_2p1x3",
        "lite_deformable_detr_r50_h3l1_3p1x2",
        "lite_deformable_detr_r50_h3l1_6p1x1",
        "lite_deformable_detr_r50_h2l2_2p1x3",
    )
]


class Tokenizer:
    """A detector up to its neck, which sets the size of an image's scales.

    Args:
        cfg: lazy config; its weights are not loaded.
    """

    def __init__(self, cfg: DictConfig):
        self.mapper = instantiate(cfg.dataloader.test.mapper)
        self.model = instantiate(cfg.model).eval()
        self.strides = scale_strides(self.model)

    @torch.no_grad()
    def grids(self, path: Path) -> list[TokenGrid]:
        """Return the tokens of an image, resized as in the test set."""
        inputs = self.mapper({"file_name": str(path)})
        images = self.model.preprocess_images([inputs])
        maps = self.model.neck(self.model.backbone(images.tensor))
        return make_grids(self.strides, [level.shape[-2:] for level in maps], inputs)


def load_configs(names: Sequence[str], opts: Sequence[str]) -> list[DictConfig]:
    """Load configs and apply the overrides.

    Raises:
        MissingFileError: there is no such config.
        ConfigError: a config is a YAML file, an override does not fit it, or the configs differ in
            their number of scales.
    """
    configs = [load_config(name, opts) for name in names]
    first = configs[0].model.num_levels
    for name, cfg in zip(names, configs):
        if cfg.model.num_levels != first:
            raise ConfigError(
                f"config {name} has {cfg.model.num_levels} scales and {names[0]} has {first}: "
                "give configs with the same number of scales"
            )
    return configs


def draw_image(tokenizer: Tokenizer, encoders: Sequence[EncoderUpdates], path: Path) -> Figure:
    """Draw the figure of an image.

    Raises:
        ImageError: the image cannot be read.
    """
    return draw_tokens(read_image(str(path), "RGB"), tokenizer.grids(path), encoders)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--input", required=True, nargs="+", help="images, patterns such as '*.jpg', or folders")
    add("--output", required=True, type=cli.folder, metavar="DIR", help="created if needed")
    cli.add_config_file(
        parser,
        required=False,
        action="append",
        help="a file or a model zoo name; may be given several times",
    )
    cli.add_overrides(parser)
    return parser.parse_intermixed_args(argv)


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
    configs = load_configs(args.config_file or CONFIGS, args.opts)
    encoders = [count_updates(instantiate(cfg.model.encoder)) for cfg in configs]
    tokenizer = Tokenizer(configs[0])
    num_drawn = 0
    bar = tqdm(images, unit="image", disable=None)
    for image, picture in zip(bar, cli.picture_paths(images, args.output)):
        try:
            figure = draw_image(tokenizer, encoders, image)
        except LiteDetrError as error:
            tqdm.write(f"{image}: skipped: {error}", file=sys.stderr)
            continue
        figure.savefig(picture, dpi=120)
        figure.savefig(picture.with_suffix(".pdf"))
        num_drawn += 1
    num_failures = len(missing) + len(images) - num_drawn
    print(f"figures: {num_drawn}, failures: {num_failures}; they are in {args.output}")
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
