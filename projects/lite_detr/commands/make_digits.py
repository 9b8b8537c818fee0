"""Make the dataset of handwritten digits on photographs: offline, in a few seconds."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from .. import cli


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--output",
        type=cli.folder,
        default=Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser() / "digits",
        metavar="DIR",
        help="folder (default: %(default)s, where digits_train and digits_val are registered)",
    )
    number = cli.whole_number(1)
    for name, kind, default, text in (
        ("--train", number, 500, "training images"),
        ("--val", number, 80, "validation images"),
        ("--seed", cli.whole_number(0), 0, "random seed"),
    ):
        parser.add_argument(
            name, type=kind, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    return parser.parse_args(argv)


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    # They import Detectron2, which takes seconds.
    from tqdm import tqdm

    from ..data.digits import SPLITS, is_written, write_digits_dataset
    from ..data.inspection import count_by_size

    if is_written(args.output, args.train, args.val, args.seed):
        print(f"{args.output} already holds this dataset; nothing to do.")
    else:
        with tqdm(total=args.train + args.val, unit="image") as bar:
            write_digits_dataset(args.output, args.train, args.val, args.seed, on_image=bar.update)
    for split in SPLITS:
        dataset = json.loads((args.output / f"{split}.json").read_text())
        sizes = count_by_size(annotation["area"] for annotation in dataset["annotations"])
        print(
            f"{split}: {len(dataset['images'])} images, {len(dataset['annotations'])} objects ("
            + ", ".join(f"{count} {size}" for size, count in sizes.items())
            + ")"
        )
