#!/usr/bin/env python
"""Convert a checkpoint of another implementation to the names and shapes of one of our configs.

    convert_checkpoint.py --config-file dino/lite_dino_r50_h3l1_2p1x3_36ep.py \\
        --input r50_s3ex3_50.4.pth --output lite_dino.pth

The input is a file or an address: the authors' Lite-DINO, DINO, Deformable DETR and H-DETR,
Deformable DETR of transformers (.safetensors or .bin), or a ResNet or Swin backbone. Options follow
as key=value; model.num_classes=91 keeps the references' heads, which otherwise become COCO's 80
classes. docs/checkpoints.md lists the releases.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import instantiate
from detectron2.utils.file_io import PathManager

from lite_detr import cli
from lite_detr.checkpoint import Conversion, convert_weights, read_weights
from lite_detr.checkpoint.files import atomic_open
from lite_detr.errors import MissingFileError, downloading
from lite_detr.overrides import load_config


def convert_file(config_file: str, options: list[str], path: str) -> Conversion:
    """Read a checkpoint and convert it to the model of a config.

    Raises:
        LiteDetrError: the config or file is missing or broken, or they do not fit.
    """
    config = load_config(config_file, options)
    with downloading(f"weights {path}", "--input FILE"):
        local = Path(PathManager.get_local_path(path) if "://" in path else path)
    if not local.is_file():
        raise MissingFileError(f"weights {path}: there is no such file")
    return convert_weights(read_weights(str(local)), instantiate(config.model))


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__)
    cli.add_config_file(parser)
    add = parser.add_argument
    add("--input", required=True, metavar="FILE", help="the checkpoint to convert")
    add("--output", required=True, type=Path, metavar="FILE.pth", help="the file to write")
    add("--every-key", action="store_true", help="print what became of every key")
    cli.add_overrides(parser)
    args = parser.parse_intermixed_args(argv)
    conversion = convert_file(args.config_file, args.opts, args.input)
    print(conversion.table() if args.every_key else conversion.summary())
    if conversion.renewed:
        print(f"warning: the {len(conversion.renewed)} weights of other classes are random")
    with atomic_open(args.output, "wb") as file:
        torch.save({"model": conversion.state_dict, "__author__": conversion.source}, file)


if __name__ == "__main__":
    main()
