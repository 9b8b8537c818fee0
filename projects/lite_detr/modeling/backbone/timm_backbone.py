"""Use any convolutional or hierarchical model of timm as a Detectron2 backbone."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from detectron2.config import configurable
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn

from ...checkpoint import read_weights
from ...errors import (
    ConfigError,
    MissingFileError,
    MissingPackageError,
    WeightsError,
    downloading,
)
from .feature_maps import FeatureMapBackbone, unknown_model

logger = logging.getLogger("lite_detr")


@BACKBONE_REGISTRY.register()
class TimmBackbone(FeatureMapBackbone):
    """Feature maps of a timm model, named ``stride8``, ``stride16`` and so on.

    Args:
        model_name: a model that ``timm.create_model(..., features_only=True)`` can make.
        out_strides: the strides of the maps to return.
        pretrained: let timm download its weights.
        weights: a file with weights instead, in the names of the whole timm model.
        state_dict: the weights themselves, such as :func:`efficientnet_lite0_state_dict` returns;
            those that the maps do not need are ignored.
        frozen_norm: keep pretrained batch norms: neither statistics nor weights train.
        frozen_stride: freeze the weights that the map of this stride, and so every finer one,
            depends on; 0 trains all.
        size_divisibility: pad images until height and width are multiples of it; 0 pads nothing.
        options: further arguments of ``timm.create_model``, such as ``strict_img_size=False`` for
            window-based models, or ``drop_path_rate``.

    Raises:
        MissingPackageError: timm is not installed.
        MissingFileError: a model in a folder is not there.
        ConfigError: there is no such model; it has no map of a stride in ``out_strides``, or only
            accepts images of one size; or weights are given in several ways.
        WeightsError: weights cannot be read, or do not fit the model.
        DownloadError: they cannot be downloaded.
    """

    config_node = "TIMM"

    @configurable
    def __init__(
        self,
        model_name: str,
        out_strides: Sequence[int] = (8, 16, 32),
        pretrained: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        frozen_norm: bool = True,
        frozen_stride: int = 0,
        weights: str = "",
        size_divisibility: int = 0,
        options: Mapping[str, object] | None = None,
    ):
        given = {"pretrained": pretrained, "weights": weights, "state_dict": state_dict is not None}
        given = [name for name, value in given.items() if value]
        if len(given) > 1:
            raise ConfigError(
                f"weights are given by {' and '.join(given)}: give one of pretrained, weights and "
                "state_dict"
            )
        if weights:
            state_dict = read_weights(weights)
        strides = {*out_strides, frozen_stride} - {0}
        options = dict(options or {}) | {"pretrained": pretrained}
        if state_dict is None:
            body, keys = make_body(model_name, strides, options)
        else:
            overlay = {"state_dict": dict(state_dict)}
            options |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
            with errors_only(logging.getLogger("timm")):
                body, keys = make_body(model_name, strides, options)
            check_loaded(body, state_dict, model_name)
        super().__init__(body, keys, out_strides, frozen_norm, frozen_stride, size_divisibility)
        if pretrained:
            self.weights_source = f"weights from timm's {model_name}"
        elif weights:
            self.weights_source = f"weights from {weights}"
        elif state_dict is not None:
            self.weights_source = getattr(state_dict, "source", "weights from its state_dict")


def make_body(
    model_name: str, strides: set[int], options: dict[str, object]
) -> tuple[nn.Module, dict[int, int]]:
    """Return a timm feature extractor, and the index of each stride's map in its output."""
    try:
        import timm
    except ModuleNotFoundError:
        raise MissingPackageError("TimmBackbone needs timm: run `pip install timm`") from None
    # Names with a colon are on a hub or in a folder.
    if ":" not in model_name and not timm.is_model(model_name):
        raise unknown_model("timm", model_name, timm.list_models())
    options = options | {"features_only": True}
    # Both weights and, with a colon, configs come from the network.
    try:
        with downloading(f"timm's {model_name}", "model.backbone.weights=FILE"):
            body = timm.create_model(model_name, **options)
    except FileNotFoundError as error:
        raise MissingFileError(f"timm's {model_name}: {error}") from error
    info = body.feature_info
    every = range(len(info))
    offered = info.reduction(list(every))
    missing = sorted(strides - set(offered))
    if missing:
        raise ConfigError(
            f"{model_name} has no feature map of stride {missing}; it offers {offered}"
        )
    # If several maps have a stride, the last one comes after the most layers.
    index = {stride: every[-1 - offered[::-1].index(stride)] for stride in strides}
    wanted = sorted(index.values())
    given = [every[i] for i in info.out_indices]
    if wanted[-1] != given[-1] or not set(wanted) <= set(given):
        # timm drops the layers after the last map, and by default does not return all maps.
        body, given = timm.create_model(model_name, out_indices=wanted, **options), wanted
    return body, {stride: given.index(index[stride]) for stride in strides}


@contextmanager
def errors_only(library: logging.Logger) -> Iterator[None]:
    """Silence a library's warnings: timm's list the classifier's weights, which no map needs."""
    level = library.level
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.setLevel(level)


def check_loaded(body: nn.Module, state_dict: Mapping[str, Tensor], model_name: str) -> None:
    """Check that weights were loaded, as timm silently ignores those that do not fit.

    Weights are compared by value, as timm renames and reshapes some while loading. Constant ones,
    such as fresh norms have, tell nothing and are not compared.

    Raises:
        WeightsError: none was loaded.
    """
    by_shape = defaultdict(list)
    for value in state_dict.values():
        by_shape[value.shape].append(value)
    weights = {
        name: weight
        for name, weight in body.named_parameters()
        if (weight != weight.flatten()[0]).any()
    }
    lacking = [
        name
        for name, weight in weights.items()
        if not any(torch.equal(weight, value.to(weight)) for value in by_shape[weight.shape])
    ]
    if len(lacking) == len(weights):
        raise WeightsError(
            f"the weights fit nothing in {model_name}: its own start with {list(weights)[:3]}, "
            f"those given with {list(state_dict)[:3]}. Give weights in the names of timm's model"
        )
    if lacking:
        logger.warning(
            "%d of the %d weights of %s are not among those given, such as %s: timm initialised or "
            "adapted them",
            len(lacking),
            len(weights),
            model_name,
            lacking[0],
        )
