#!/usr/bin/env python
"""Convert a checkpoint of another implementation to the names and shapes of one of our configs.

    convert_checkpoint.py --config-file dino/lite_dino_r50_h3l1_2p1x3_36ep.py \\
        --input r50_s3ex3_50.4.pth --output lite_dino.pth
    convert_checkpoint.py --config-file output/config.yaml --input output/model_final.pth \\
        --output output/model_final.safetensors

The input is a file or an address: the authors' Lite-DINO, DINO, Deformable DETR and H-DETR, those
of detrex and MMDetection, Deformable DETR of transformers (.safetensors or .bin), or a ResNet or
Swin backbone. Options follow as key=value; model.num_classes=91 keeps the authors' heads, which
otherwise become COCO's 80 classes. docs/checkpoints.md lists the releases.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from detectron2.config import instantiate
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig
from torch import Tensor, nn

from lite_detr import cli
from lite_detr.checkpoint import Conversion, DetrCheckpointer, convert_weights, read_weights
from lite_detr.checkpoint.convert import as_tensors
from lite_detr.checkpoint.files import atomic_open
from lite_detr.checkpoint.release_file import write_release
from lite_detr.checkpoint.sources import recognise
from lite_detr.data.catalog import class_metadata
from lite_detr.errors import MissingFileError, WeightsError, downloading
from lite_detr.inference.released import release_config
from lite_detr.overrides import load_config

# The suffix of the format that also holds a config.
SAFETENSORS = ".safetensors"


def find_file(path: str) -> str:
    """Return the local path of a checkpoint, which is downloaded if it is an address.

    Raises:
        LiteDetrError: there is no such file, or it cannot be downloaded.
    """
    with downloading(f"weights {path}", "--input FILE"):
        local = Path(PathManager.get_local_path(path) if "://" in path else path)
    if not local.is_file():
        raise MissingFileError(f"weights {path}: there is no such file")
    return str(local)


def convert_file(config: DictConfig, file: str) -> Conversion:
    """Read a checkpoint and convert it to the model of a config.

    Raises:
        LiteDetrError: the file is broken, or does not fit the config.
    """
    weights = read_weights(file)
    try:
        return convert_weights(weights, instantiate(config.model))
    except WeightsError as error:
        raise WeightsError(f"{file}: {error}") from error


def read_own(config: DictConfig, file: str) -> nn.Module:
    """Return the model of a config with the weights of one of our own checkpoints.

    Raises:
        LiteDetrError: the file is broken, or does not fit the config.
    """
    model = instantiate(config.model)
    DetrCheckpointer(model).load(file)
    print(f"lite_detr: {len(model.state_dict())} weights")
    return model


def write(
    path: Path,
    config: DictConfig,
    weights: Mapping[str, Tensor],
    source: str,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write weights, into a safetensors file with the config and the names of the classes.

    Args:
        path: its suffix decides on the format.
        config: of the model.
        weights: by our names.
        source: the implementation that they come from.
        class_names: those that came with the weights; None takes the config's dataset's.

    Raises:
        LiteDetrError: the file cannot be written, or not with this config.
    """
    if path.suffix == SAFETENSORS:
        metadata = class_metadata(config, class_names)
        names = metadata and metadata.thing_classes
        write_release(path, weights, release_config(config), names)
        return
    with atomic_open(path, "wb") as file:
        torch.save({"model": weights, "__author__": source}, file)


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__)
    cli.add_config_file(parser)
    add = parser.add_argument
    add("--input", required=True, metavar="FILE", help="the checkpoint to convert")
    add(
        "--output",
        required=True,
        type=Path,
        metavar="FILE.pth",
        help="the file to write; FILE.safetensors also holds the config and the names of the "
        "classes, and may be made of our own checkpoints",
    )
    add("--every-key", action="store_true", help="print what became of every key")
    cli.add_overrides(parser)
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config_file, args.opts)
    file = find_file(args.input)
    is_own = recognise(as_tensors(read_weights(file))) is None
    if is_own and args.output.suffix == SAFETENSORS:
        model = read_own(config, file)
        write(args.output, config, model.state_dict(), "lite_detr", model.class_names)
        return
    conversion = convert_file(config, file)
    print(conversion.table() if args.every_key else conversion.summary())
    if conversion.renewed:
        print(f"warning: the {len(conversion.renewed)} weights of other classes are random")
    write(args.output, config, conversion.state_dict, conversion.source)


if __name__ == "__main__":
    main()
