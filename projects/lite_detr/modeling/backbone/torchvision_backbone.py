"""Use any convolutional or hierarchical classifier of torchvision as a Detectron2 backbone."""

from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import configurable
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn
from torch.fx import GraphModule
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import StochasticDepth

from ...checkpoint import read_weights
from ...errors import ConfigError, WeightsError, downloading
from .feature_maps import FeatureMapBackbone, read_layout, run_trial, trial_image, unknown_model


@BACKBONE_REGISTRY.register()
class TorchvisionBackbone(FeatureMapBackbone):
    """Feature maps of a torchvision model, named ``stride8``, ``stride16`` and so on.

    Args:
        model_name: a classifier that ``torchvision.models.get_model`` can make.
        out_strides: the strides of the maps to return.
        weights: a name of torchvision's, such as ``DEFAULT`` or ``IMAGENET1K_V1``, which it
            downloads, or a file with the whole model's weights; None starts from random weights.
        return_nodes: the module, or the node of the traced model, that returns the map of each of
            ``out_strides``; None uses the last stage of each stride.
        frozen_norm: keep pretrained batch norms: neither statistics nor weights train.
        frozen_stride: freeze the weights that the map of this stride, and so every finer one,
            depends on; 0 trains all.
        size_divisibility: pad images until height and width are multiples of it; 0 pads nothing.

    Raises:
        ConfigError: there is no such model; it has no map of a stride in ``out_strides``, no such
            node or weights, or only accepts images of one size.
        WeightsError: weights cannot be read, or do not fit the model.
        DownloadError: they cannot be downloaded.
    """

    config_node = "TORCHVISION"

    @configurable
    def __init__(
        self,
        model_name: str,
        out_strides: Sequence[int] = (8, 16, 32),
        weights: str | None = None,
        return_nodes: Sequence[str] | None = None,
        frozen_norm: bool = True,
        frozen_stride: int = 0,
        size_divisibility: int = 0,
    ):
        model = make_model(model_name, weights)
        if return_nodes and len(return_nodes) != len(out_strides):
            raise ConfigError(
                f"return_nodes names {len(return_nodes)} maps {list(return_nodes)} for the "
                f"{len(out_strides)} strides {list(out_strides)}: give one for each"
            )
        nodes = dict(zip(out_strides, return_nodes or ()))
        strides = {*out_strides, frozen_stride} - {0}
        if strides - set(nodes):
            found = find_stages(model, strides, size_divisibility)
            missing = sorted(strides - set(nodes) - set(found))
            if missing:
                raise ConfigError(
                    f"{model_name} has no feature map of stride {missing}; it offers "
                    f"{sorted(found)}"
                )
            nodes = {stride: nodes.get(stride, found.get(stride)) for stride in strides}
        extractor = create_feature_extractor(
            model,
            return_nodes={node: f"stride{stride}" for stride, node in nodes.items()},
            tracer_kwargs={"leaf_modules": [StochasticDepth]},
        )
        # One graph for both modes: dropout and stochastic depth are modules, with their own mode.
        body = GraphModule(extractor, extractor.eval_graph)
        keys = {stride: f"stride{stride}" for stride in nodes}
        super().__init__(body, keys, out_strides, frozen_norm, frozen_stride, size_divisibility)
        if weights:
            by_name = "" if Path(weights).is_file() else f"torchvision's {model_name} "
            self.weights_source = f"weights from {by_name}{weights}"


def make_model(model_name: str, weights: str | None) -> nn.Module:
    """Return a torchvision model, with torchvision's weights by name or those of a file."""
    if model_name.lower() not in models.list_models():
        raise unknown_model("torchvision", model_name, models.list_models(models))
    if not weights:
        return models.get_model(model_name, weights=None)
    if Path(weights).is_file():
        model = models.get_model(model_name, weights=None)
        try:
            model.load_state_dict(read_weights(weights))
        except RuntimeError as error:
            raise WeightsError(f"weights {weights} do not fit {model_name}: {error}") from error
        return model
    names = models.get_model_weights(model_name).__members__
    if weights not in names:
        raise ConfigError(
            f"weights {weights!r} are not a file, and {model_name} has none of this name; accepted "
            f"are a file and {', '.join(names)}"
        )
    with downloading(f"weights {names[weights].url}", "model.backbone.weights=FILE"):
        return models.get_model(model_name, weights=names[weights])


def find_stages(model: nn.Module, strides: set[int], size_divisibility: int) -> dict[int, str]:
    """Return, for each stride, the module that returns a model's last map of it.

    Outer modules take precedence: what a block computes inside is not the map of a stage.
    """
    image = trial_image(model, max(strides), size_divisibility)
    ended: list[tuple[int, str, object]] = []
    hooks = [
        module.register_forward_hook(
            lambda _, args, output, name=name: ended.append((name.count("."), name, output))
        )
        for name, module in model.named_modules()
        if name
    ]
    with torch.no_grad():
        run_trial(model, image)
    for hook in hooks:
        hook.remove()
    found: dict[int, tuple[int, str]] = {}
    for depth, name, output in ended:
        seen = read_layout(output, image)
        if seen and depth <= found.get(seen.stride, (depth, ""))[0]:
            found[seen.stride] = depth, name
    return {stride: name for stride, (_, name) in found.items()}
