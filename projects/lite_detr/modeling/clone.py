"""Stacks of layers that are alike but start from weights of their own."""

import copy

from torch import nn


def clone_layers(layer: nn.Module, num_layers: int) -> nn.ModuleList:
    """``num_layers`` copies of a prototype, each with freshly drawn weights.

    Configs state a layer once; a plain copy would start every layer of a stack from equal weights.
    Children are reset before their parents, so that a module's own initialisation has the last
    word over PyTorch's defaults for its parts.
    """
    layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))
    for module in reversed(list(layers.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return layers
