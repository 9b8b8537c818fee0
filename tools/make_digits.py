#!/usr/bin/env python
"""Make the dataset of handwritten digits on photographs: offline, in a few seconds."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from lite_detr import cli
from lite_detr.data.digits import SPLITS, is_written, write_digits_dataset
from lite_detr.data.inspection import count_by_size


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=cli.folder,
        default=Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser() / "digits",
        help="folder; the default is where digits_train and digits_val are registered",
    )
    number = cli.whole_number(1)
    parser.add_argument("--train", type=number, default=500, help="number of training images")
    parser.add_argument("--val", type=number, default=80, help="number of validation images")
    parser.add_argument("--seed", type=cli.whole_number(0), default=0, help="random seed")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
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


if __name__ == "__main__":
    main()
