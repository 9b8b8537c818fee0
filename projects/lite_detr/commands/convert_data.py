"""Make COCO files of a dataset that is labelled in another form, or has no validation images.

    %(prog)s blood_voc --output blood          # a folder with Pascal VOC's XML files
    %(prog)s blood_yolo --output blood         # a folder with YOLO's labels and data.yaml
    %(prog)s all.json --images blood/images --output blood    # a COCO file, to be split

Writes train.json and val.json (and test.json, if there are images for it), and prints the command
that trains on them. Images stay where they are. Splits are those of the dataset: folders such as
train and valid, data.yaml, ImageSets/Main. If it has none for validation, some are chosen by
--seed. Exports of Roboflow, CVAT, Label Studio and labelImg in these forms are read as well.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from .. import cli, register
from ..errors import MissingFileError


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="the dataset's folder, or a COCO file")
    add("--output", required=True, type=cli.folder, metavar="DIR", help="for the COCO files")
    add("--images", type=Path, metavar="DIR", help="the images of a COCO file")
    add(
        "--val-share",
        type=cli.score,
        default=0.2,
        metavar="SHARE",
        help="of the images, if none are for validation (default: %(default)s)",
    )
    add("--seed", type=cli.whole_number(0), default=0, metavar="N", help="of that choice")
    args = parser.parse_args(argv)
    if args.images and not args.source.is_file():
        parser.error("--images goes with a COCO file; a folder's images are found by themselves")
    return args


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.source.exists():
        raise MissingFileError(
            f"{args.source}: not found; give a folder with Pascal VOC or YOLO labels, or a COCO "
            "file"
        )
    # From here on PyTorch and Detectron2 are imported, which takes seconds.
    register()
    import torch

    from ..data.conversion import convert_dataset, write_conversion
    from ..labels import printable

    conversion = convert_dataset(args.source, args.images, args.val_share, args.seed)
    cli.make_folder(args.output)
    paths = write_conversion(conversion, args.output)
    categories = conversion.contents["train"]["categories"]
    names = ", ".join(str(category["name"]) for category in categories[:10])
    more = ", ..." if len(categories) > 10 else ""
    print(f"{args.source}: {conversion.kind}, {len(categories)} classes: {printable(names)}{more}")
    for split, path in paths.items():
        content = conversion.contents[split]
        numbers = f"{len(content['images'])} images, {len(content['annotations'])} objects"
        print(f"  {path}: {numbers}")
    for note in conversion.notes:
        print(f"  note: {printable(note)}")
    config = "lite_dino_r50" if torch.cuda.is_available() else "lite_dino_efficientnet_lite0"
    root, train, val = (
        shlex.quote(str(path)) for path in (conversion.image_root, paths["train"], paths["val"])
    )
    print(
        f"train on it with\n  lite-detr train --config-file own_data/{config}.py \\\n"
        f"      data.train_json={train} data.train_images={root} \\\n"
        f"      data.val_json={val} data.val_images={root} \\\n"
        f"      train.output_dir=output/{shlex.quote(args.output.resolve().name)}"
    )
