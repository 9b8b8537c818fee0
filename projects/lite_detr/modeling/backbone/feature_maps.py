"""Base of the backbones from other libraries: maps by stride, and frozen parts."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from ...errors import ConfigError


class FeatureMapBackbone(Backbone):
    """The feature maps of a model, named ``stride8``, ``stride16`` and so on.

    A small trial image passes the body first, which shows the channels and the order of dimensions
    of its maps. Weights that no requested map depends on are frozen, as DistributedDataParallel
    waits for the gradients of all others.

    Args:
        body: ``[B, 3, H, W]`` -> a list or dict of maps, ``[B, C, H, W]`` or ``[B, H, W, C]``.
        keys: the index or key in that list or dict of each stride's map.
        out_strides: the strides of the maps to return.
        frozen_norm: keep pretrained batch norms: neither statistics nor weights train.
        frozen_stride: freeze the weights that the map of this stride, and so every finer one,
            depends on; 0 trains all.
        size_divisibility: pad images until height and width are multiples of it; 0 pads nothing.

    Attributes:
        weights_source: a phrase that says which weights the body has; empty for random ones.

    Raises:
        ConfigError: the body does not accept images of any size, or a map has another stride.
    """

    # The key in ``cfg.MODEL`` of a subclass's arguments.
    config_node: ClassVar[str]
    weights_source = ""

    def __init__(
        self,
        body: nn.Module,
        keys: Mapping[int, int | str],
        out_strides: Sequence[int],
        frozen_norm: bool,
        frozen_stride: int,
        size_divisibility: int,
    ):
        super().__init__()
        self.body = body
        self._size_divisibility = size_divisibility
        self._frozen_norms = [
            module
            for module in body.modules()
            if frozen_norm and isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        for norm in self._frozen_norms:
            norm.requires_grad_(False)

        image = trial_image(body, max(keys), size_divisibility)
        with torch.enable_grad():
            maps = run_trial(body, image)
            self._maps: dict[str, tuple[int | str, bool]] = {}
            self._shapes: dict[str, ShapeSpec] = {}
            for stride in out_strides:
                feature = maps[keys[stride]]
                seen = read_layout(feature, image)
                if seen is None or seen.stride != stride:
                    raise ConfigError(
                        f"a map of stride {stride} is needed, but for an image "
                        f"{tuple(image.shape)} it is {tuple(feature.shape)}; accepted are "
                        "[B, C, H / stride, W / stride] and [B, H / stride, W / stride, C]"
                    )
                self._maps[f"stride{stride}"] = keys[stride], seen.channels_last
                self._shapes[f"stride{stride}"] = ShapeSpec(channels=seen.channels, stride=stride)
            used = parameters_behind(body, [maps[keys[stride]] for stride in out_strides])
            early = parameters_behind(body, [maps[keys[frozen_stride]]]) if frozen_stride else set()
        for parameter in body.parameters():
            if parameter not in used or parameter in early:
                parameter.requires_grad_(False)
        self.train(self.training)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Return the arguments that a YAML config gives in capitals.

        Raises:
            ConfigError: the name of the model is not set.
        """
        node = cfg.MODEL.get(cls.config_node, {})
        if not node.get("MODEL_NAME"):
            raise ConfigError(
                f"MODEL.BACKBONE.NAME is {cls.__name__}, but MODEL.{cls.config_node}.MODEL_NAME "
                "is not set: name the library's model there, after "
                "lite_detr.add_lite_detr_config(cfg)"
            )
        return {key.lower(): value for key, value in node.items() if value is not None}

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def train(self, mode: bool = True) -> "FeatureMapBackbone":
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``[B, 3, H, W]`` -> maps by name, ``[B, C_l, H / stride, W / stride]``."""
        maps = self.body(images)
        return {
            name: maps[key].permute(0, 3, 1, 2) if channels_last else maps[key]
            for name, (key, channels_last) in self._maps.items()
        }


def unknown_model(library: str, name: str, names: Sequence[str]) -> ConfigError:
    """Return the error for a model name that a library does not have, with similar names."""
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "its list_models() names them all"
    return ConfigError(f"{library} has no model {name!r}; {hint}")


def trial_image(body: nn.Module, stride: int, size_divisibility: int) -> Tensor:
    """Return the smallest image ``[1, 3, H, W]`` that is a multiple of all strides up to one."""
    unit = math.lcm(stride, size_divisibility or 1)
    device = next((parameter.device for parameter in body.parameters()), None)
    return torch.zeros(1, 3, 2 * unit, 3 * unit, device=device)


def run_trial(model: nn.Module, image: Tensor) -> Any:
    """Run a model in evaluation mode, and leave it in that mode.

    Raises:
        ConfigError: it does not accept the image.
    """
    try:
        return model.eval()(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        height, width = image.shape[2:]
        raise ConfigError(
            f"the backbone does not accept an image of {height}x{width} pixels ({error}). A "
            "detector's images have any size: choose another model, or an option of this one that "
            "allows it, such as strict_img_size=False, with size_divisibility if heights and "
            "widths must be multiples of a number"
        ) from error


class Layout(NamedTuple):
    """The layout of a feature map."""

    stride: int
    channels: int
    channels_last: bool


def read_layout(feature: object, image: Tensor) -> Layout | None:
    """Read it from a map ``[1, C, h, w]`` or ``[1, h, w, C]``; None if it is not one."""
    if not (isinstance(feature, Tensor) and feature.dim() == 4):
        return None
    height, width = image.shape[2:]
    for rows, columns, channels in ((2, 3, 1), (1, 2, 3)):
        stride = height // feature.shape[rows]
        if (feature.shape[rows] * stride, feature.shape[columns] * stride) == (height, width):
            return Layout(stride, feature.shape[channels], channels_last=channels == 3)
    return None


def parameters_behind(body: nn.Module, maps: Sequence[Tensor]) -> set[nn.Parameter]:
    """Return the trainable parameters that maps depend on."""
    parameters = [parameter for parameter in body.parameters() if parameter.requires_grad]
    maps = [feature.sum() for feature in maps if feature.requires_grad]
    if not (parameters and maps):
        return set()
    gradients = torch.autograd.grad(maps, parameters, retain_graph=True, allow_unused=True)
    return {p for p, gradient in zip(parameters, gradients) if gradient is not None}
