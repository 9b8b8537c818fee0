"""Evaluate a trained detector on its test set, with COCO's metrics.

    %(prog)s --config-file digits/lite_dino_efficientnet_lite0.py \\
        --weights output/demo/model_final.pth

Detections and a log go to train.output_dir. Options of the config follow as key=value, such as
data.val_json=FILE and data.val_images=DIR for a dataset of your own. Without --weights, those of
train.init_checkpoint are used.
"""

import argparse
from collections.abc import Sequence

from .. import cli
from .train import add_job_options, start


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    cli.add_config_file(parser)
    parser.add_argument("--weights", metavar="FILE", help="weights of the trained detector")
    cli.add_optimize(parser)
    add_job_options(parser)
    cli.add_overrides(parser)
    args = parser.parse_intermixed_args(argv)
    if args.weights:
        args.opts.append(f"train.init_checkpoint={args.weights}")
    args.eval_only, args.resume = True, False
    return args


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    start(parse_args(argv))
