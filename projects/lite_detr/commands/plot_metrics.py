"""Draw the losses and the average precision of a training run from its metrics.json."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .. import cli


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("metrics", type=Path, help="metrics.json in a run's output_dir")
    parser.add_argument("--output", type=Path, help="picture to write (default: beside the file)")
    return parser.parse_args(argv)


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    # It imports PyTorch and Matplotlib, which takes seconds.
    from ..engine.metrics_plot import plot

    output = args.output or args.metrics.with_name("training.png")
    plot(args.metrics, output)
    print(f"losses and average precision of {args.metrics}: {output}")
