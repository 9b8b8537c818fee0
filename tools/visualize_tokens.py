#!/usr/bin/env python
"""Draw the multi-scale tokens of an image, and how often encoders update those of each scale.

    visualize_tokens.py --input photo.jpg --output output/tokens

An image NAME.jpg becomes DIR/NAME.png and DIR/NAME.pdf: its cells on each scale, the share of all
tokens that they are, and a chart for each encoder, in which areas are updates of tokens. Given
--config-file, once or several times, the encoders are those of the configs, else the full one and
lite ones of the paper. The first config says how the image is resized and what its scales are. No
weights are needed. Options follow as key=value, though not right after --input; they change all
configs. The exit status is 0 if all images were drawn, 1 if one was not or none was found.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from detectron2.config import instantiate
from feature_scales import scale_strides
from matplotlib.figure import Figure
from omegaconf import DictConfig
from token_figure import EncoderUpdates, TokenGrid, draw_tokens
from torch import nn
from tqdm import tqdm

from lite_detr import cli, model_zoo
from lite_detr.analysis.attention_maps import find_attentions, record_attention
from lite_detr.data.image_files import ImageError, read_image
from lite_detr.modeling import DeformableEncoder, InterleavedEncoder, Scales
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
    """A detector up to its neck, which says how large an image's scales are.

    Args:
        cfg: lazy config; its weights are not read.
    """

    def __init__(self, cfg: DictConfig):
        self.mapper = instantiate(cfg.dataloader.test.mapper)
        self.model = instantiate(cfg.model).eval()
        self.strides = scale_strides(self.model)

    @torch.no_grad()
    def grids(self, path: Path) -> list[TokenGrid]:
        """The tokens of an image that is resized as in the test set."""
        inputs = self.mapper({"file_name": str(path)})
        resized = inputs["image"].shape[1:]
        cell = [inputs[name] / side for name, side in zip(("height", "width"), resized)]
        images = self.model.preprocess_images([inputs])
        maps = self.model.neck(self.model.backbone(images.tensor))
        return [
            TokenGrid(
                stride=stride,
                shape=tuple(level.shape[-2:]),
                cell=(stride * cell[0], stride * cell[1]),
            )
            for stride, level in zip(self.strides, maps)
        ]


@torch.no_grad()
def count_updates(encoder: nn.Module) -> EncoderUpdates:
    """How often an encoder updates each scale, by what its attentions take as queries."""
    attention = next(iter(find_attentions(encoder).values()))
    # A pyramid of few tokens; an encoder treats scales alike whatever their size.
    sides = [2**level for level in reversed(range(attention.num_levels))]
    masks = [torch.zeros(1, side, side, dtype=torch.bool) for side in sides]
    scales = Scales.from_masks(masks, padded=False, dtype=torch.float32)
    tokens = torch.zeros(1, scales.num_tokens, attention.output_proj.out_features)
    with record_attention(encoder) as maps:
        encoder.eval()(tokens, tokens, scales)
    updated = [level for attention_map in maps for level in attention_map.query_levels]
    counts = tuple(updated.count(level) for level in range(attention.num_levels))
    return EncoderUpdates(encoder_name(encoder, attention.num_levels), counts)


def encoder_name(encoder: nn.Module, num_levels: int) -> str:
    """As the paper writes it."""
    if isinstance(encoder, InterleavedEncoder):
        low = encoder.num_low_levels
        blocks = len(encoder.low_level_ffns)
        return f"H{num_levels - low}L{low}-({encoder.updates_per_block}+1)x{blocks}"
    if isinstance(encoder, DeformableEncoder):
        return "full encoder"
    return type(encoder).__name__


def load_configs(names: Sequence[str], opts: Sequence[str]) -> list[DictConfig]:
    """The configs with the options applied.

    Raises:
        FileNotFoundError: there is no such config.
        ConfigError: it is a YAML file, an option does not fit it, or it has another number of
            scales than the first.
    """
    configs = [load_config(name, opts) for name in names]
    first = configs[0].model.num_levels
    for name, cfg in zip(names, configs):
        if cfg.model.num_levels != first:
            raise model_zoo.ConfigError(
                f"config {name} has {cfg.model.num_levels} scales and {names[0]} has {first}: "
                "give configs with one number of scales"
            )
    return configs


def draw_image(
    tokenizer: Tokenizer, encoders: Sequence[EncoderUpdates], path: Path
) -> Figure | None:
    """The figure of an image, or None and a line on stderr where it cannot be read."""
    try:
        image = read_image(str(path), "RGB")
    except ImageError as error:
        tqdm.write(f"{path}: skipped: {error}", file=sys.stderr)
        return None
    return draw_tokens(image, tokenizer.grids(path), encoders)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", required=True, nargs="+", help="images, patterns such as '*.jpg', or folders")
    add("--output", required=True, type=cli.folder, metavar="DIR", help="made if need be")
    add(
        "--config-file",
        action="append",
        metavar="C",
        help="a file or a name of the model zoo; may be given several times",
    )
    cli.add_overrides(parser)
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the figures and returns the exit status."""
    args = parse_args(argv)
    images, missing = cli.find_images(args.input)
    for text in missing:
        print(f"{text}: skipped, as it gives no image", file=sys.stderr)
    if not images:
        return 1
    try:
        configs = load_configs(args.config_file or CONFIGS, args.opts)
    except (FileNotFoundError, model_zoo.ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    encoders = [count_updates(instantiate(cfg.model.encoder)) for cfg in configs]
    tokenizer = Tokenizer(configs[0])
    args.output.mkdir(parents=True, exist_ok=True)
    num_drawn = 0
    bar = tqdm(images, unit="image", disable=None)
    for image, picture in zip(bar, cli.picture_paths(images, args.output)):
        figure = draw_image(tokenizer, encoders, image)
        if figure is None:
            continue
        figure.savefig(picture, dpi=120)
        figure.savefig(picture.with_suffix(".pdf"))
        plt.close(figure)
        num_drawn += 1
    num_failures = len(missing) + len(images) - num_drawn
    print(f"figures: {num_drawn}, failures: {num_failures}; they are in {args.output}")
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
