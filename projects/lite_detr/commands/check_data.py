"""Report everything that is wrong with a dataset: reads its annotations and every image.

    %(prog)s data.train_json=blood/train.json data.train_images=blood/images \\
        data.val_json=blood/val.json data.val_images=blood/images
    %(prog)s --config-file dino/dino_r50_4scale_12ep.py   # the datasets that the config names

The options after --config-file are those of training. The exit status is 0 if a run would use all
of the data, 1 if it would be refused, stop or skip some, and 2 if nothing can be checked.
docs/data_faults.md says what becomes of each kind of fault.
"""

import argparse
import json
from collections.abc import Sequence

from .. import cli, model_zoo, register
from ..cores import count_cores

CONFIG = "own_data/lite_dino_r50.py"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    cli.add_config_file(parser, required=False, default=CONFIG)
    parser.add_argument(
        "--workers",
        type=cli.whole_number(1),
        default=count_cores(),
        metavar="N",
        help="processes that read images (default: the number of cores)",
    )
    parser.add_argument(
        "--json", type=cli.file_name(".json"), metavar="FILE", help="write the whole report to it"
    )
    cli.add_overrides(parser)
    return parser.parse_intermixed_args(argv)


@cli.user_errors(status=2)
def main(argv: Sequence[str] | None = None) -> int:
    """Print the reports and return the exit status."""
    args = parse_args(argv)
    config_file = model_zoo.get_lazy_config_file(args.config_file)
    # From here on PyTorch and Detectron2 are imported, which takes seconds.
    register()
    from omegaconf import OmegaConf

    from ..data.dataset_report import as_json, describe, find_datasets, inspect_all
    from ..labels import printable
    from ..overrides import load_config

    cfg = load_config(config_file, args.opts)
    datasets = find_datasets(cfg)
    num_queries = OmegaConf.select(cfg, "model.queries.num_queries")
    reports = inspect_all(datasets, num_queries, args.workers)
    for title, inspection in reports.items():
        for line in describe(title, datasets[title], inspection).splitlines():
            print(printable(line))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(as_json(datasets, reports), indent=1))
    return int(any(inspection.loses_data for inspection in reports.values()))
