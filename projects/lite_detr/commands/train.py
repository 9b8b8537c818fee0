"""Train a detector from a lazy config, with Detectron2's trainers and hooks, or evaluate one.

    %(prog)s --config-file deformable_detr/lite_deformable_detr_r50_h3l1_2p1x3_50ep.py \\
        --num-gpus 8 train.output_dir=output/lite
    %(prog)s --config-file ... --resume train.output_dir=output/lite

The config is a file or a name of the model zoo (``lite_detr.model_zoo.list_configs()``); options
follow as key=value. Your own dataset needs no code: see docs/own_data.md. torchrun and srun start
it as well: see docs/several_gpus.md.
"""

import argparse
from collections.abc import Sequence

from .. import cli, model_zoo, register


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the processes of a job run, with Detectron2's names."""
    add = parser.add_argument
    add(
        "--num-gpus",
        type=cli.whole_number(0),
        metavar="N",
        help="processes on each machine, each with a GPU (default: 1); on a CPU, the cores are "
        "shared among them (default: as many as there are cores, if the batch can be divided)",
    )
    add(
        "--num-machines",
        type=cli.whole_number(1),
        default=1,
        metavar="N",
        help="machines, on each of which this program is started (default: %(default)s)",
    )
    add(
        "--machine-rank",
        type=cli.whole_number(0),
        default=0,
        metavar="N",
        help="the number of this machine, from 0 (default: %(default)s)",
    )
    add(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="where the processes meet, as tcp://ADDRESS:PORT of the first machine; needed with "
        "several machines (default: a free port of this one)",
    )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    cli.add_config_file(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in train.output_dir, if there is one",
    )
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate the weights of train.init_checkpoint instead of training",
    )
    cli.add_optimize(parser, "with --eval-only, ")
    add_job_options(parser)
    cli.add_overrides(parser)
    args = parser.parse_intermixed_args(argv)
    if args.optimize and not args.eval_only:
        parser.error("--optimize needs --eval-only: an optimized model cannot be trained")
    return args


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    start(parse_args(argv))


def start(args: argparse.Namespace) -> None:
    """Start the processes of a job, or join those that a launcher has started."""
    args.config_file = model_zoo.get_lazy_config_file(args.config_file)
    # From here on PyTorch and Detectron2 are imported, which takes seconds.
    register()
    from ..engine import training
    from ..engine.launch import launch

    training.plan(args)
    launch(run, args)


@cli.user_errors()
def run(args: argparse.Namespace) -> None:
    """Train or evaluate, in every process of a job."""
    register()
    from ..engine import training

    training.run(args)
