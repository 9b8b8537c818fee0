#!/usr/bin/env python
"""Convert a checkpoint of another implementation to the names and shapes of one of our configs.

    convert_checkpoint.py --config-file dino/lite_dino_r50_h3l1_2p1x3_36ep.py \\
        --input r50_s3ex3_50.4.pth --output lite_dino.pth

The input is a file or an address: the authors' Lite-DINO, DINO, Deformable DETR and H-DETR,
Deformable DETR of transformers (.safetensors or .bin), or a ResNet or Swin backbone. Options follow
as key=value; model.num_classes=91 keeps the references' heads, which otherwise become COCO's 80
classes. docs/checkpoints.md lists the releases.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import instantiate
from detectron2.utils.file_io import PathManager

from lite_detr import model_zoo
from lite_detr.checkpoint import Conversion, WeightsError, convert_weights, read_weights
from lite_detr.overrides import load_config


def convert_file(config_file: str, options: list[str], path: str) -> Conversion:
    """Reads a checkpoint and brings it to the model of a config.

    Raises:
        FileNotFoundError: there is no such config or file.
        ConfigError: the config is a YAML file, or an option does not fit it.
        WeightsError: the file cannot be read, or does not fit the config.
    """
    config = load_config(config_file, options)
    if "://" not in path and not Path(path).is_file():
        raise FileNotFoundError(f"weights {path}: there is no such file")
    weights = read_weights(PathManager.get_local_path(path))
    return convert_weights(weights, instantiate(config.model))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="C", help="a file or a name of the model zoo")
    add("--input", required=True, metavar="FILE", help="the checkpoint to convert")
    add("--output", required=True, type=Path, metavar="FILE.pth", help="where the result goes")
    add("--every-key", action="store_true", help="print what became of every key")
    add("opts", nargs="*", metavar="key=value", help="change the config's values")
    args = parser.parse_intermixed_args(argv)
    try:
        conversion = convert_file(args.config_file, args.opts, args.input)
    except (FileNotFoundError, model_zoo.ConfigError, WeightsError) as error:
        sys.exit(f"error: {error}")
    print(conversion.table() if args.every_key else conversion.summary())
    if conversion.renewed:
        print(f"warning: the {len(conversion.renewed)} weights of other classes are random")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": conversion.state_dict, "__author__": conversion.source}, args.output)


if __name__ == "__main__":
    main()
