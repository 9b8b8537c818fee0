"""What backbones from other libraries share: maps by stride, and parts that stay as they are."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn


class FeatureMapBackbone(Backbone):
    """Maps of a body that gives several, named ``stride8``, ``stride16`` and so on.

    One small image passes the body first. Its maps say what they have of channels and in which
    order of dimensions; weights that no wanted map is made with are frozen, as
    DistributedDataParallel waits for all others.

    Args:
        body: ``[B, 3, H, W]`` -> a list or dict of maps, ``[B, C, H, W]`` or ``[B, H, W, C]``.
        keys: for each stride where its map is in that list or dict.
        out_strides: the strides of the maps to give.
        frozen_norm: keep batch norms as they were pretrained: neither statistics nor weights train.
        frozen_stride: weights that the map of this stride, and so every finer one, is made with do
            not train; 0 trains all.
        size_divisibility: pad images until height and width are multiples of it; 0 pads nothing.

    Raises:
        ValueError: the body does not take images of any size, or a map is not of its stride.
    """

    # Where ``cfg.MODEL`` has the arguments of a subclass.
    config_node: ClassVar[str]

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
                    raise ValueError(
                        f"a map of stride {stride} is asked for, but of an image "
                        f"{tuple(image.shape)} it is {tuple(feature.shape)}; accepted are "
                        "[B, C, H / stride, W / stride] and [B, H / stride, W / stride, C]"
                    )
                self._maps[f"stride{stride}"] = keys[stride], seen.channels_last
                self._shapes[f"stride{stride}"] = ShapeSpec(channels=seen.channels, stride=stride)
            used = made_with(body, [maps[keys[stride]] for stride in out_strides])
            early = made_with(body, [maps[keys[frozen_stride]]]) if frozen_stride else set()
        for parameter in body.parameters():
            if parameter not in used or parameter in early:
                parameter.requires_grad_(False)
        self.train(self.training)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """For ``cfg.MODEL.BACKBONE.NAME``: the arguments that ``cfg`` states, in capitals.

        Raises:
            ValueError: it does not say which model.
        """
        node = cfg.MODEL.get(cls.config_node, {})
        if not node.get("MODEL_NAME"):
            raise ValueError(
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


def unknown_model(library: str, name: str, names: Sequence[str]) -> ValueError:
    """The error to raise where a library has no model of a name, with those that come closest."""
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "its list_models() names them all"
    return ValueError(f"{library} has no model {name!r}; {hint}")


def trial_image(body: nn.Module, stride: int, size_divisibility: int) -> Tensor:
    """``[1, 3, H, W]``, the smallest of which each map up to a stride is an exact part."""
    unit = math.lcm(stride, size_divisibility or 1)
    device = next((parameter.device for parameter in body.parameters()), None)
    return torch.zeros(1, 3, 2 * unit, 3 * unit, device=device)


def run_trial(model: nn.Module, image: Tensor) -> Any:
    """What a model gives in evaluation mode, in which it stays.

    Raises:
        ValueError: it does not take the image.
    """
    try:
        return model.eval()(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        height, width = image.shape[2:]
        raise ValueError(
            f"the backbone does not take an image of {height}x{width} pixels ({error}). A "
            "detector's images are of any size: choose another model, or an option of this one "
            "that allows it, such as strict_img_size=False, with size_divisibility for what "
            "heights and widths must be multiples of"
        ) from error


class Layout(NamedTuple):
    """What a map of an image tells of itself."""

    stride: int
    channels: int
    channels_last: bool


def read_layout(feature: object, image: Tensor) -> Layout | None:
    """That of a map ``[1, C, h, w]`` or ``[1, h, w, C]``; None of what is no map of the image."""
    if not (isinstance(feature, Tensor) and feature.dim() == 4):
        return None
    height, width = image.shape[2:]
    for rows, columns, channels in ((2, 3, 1), (1, 2, 3)):
        stride = height // feature.shape[rows]
        if (feature.shape[rows] * stride, feature.shape[columns] * stride) == (height, width):
            return Layout(stride, feature.shape[channels], channels_last=channels == 3)
    return None


def made_with(body: nn.Module, maps: Sequence[Tensor]) -> set[nn.Parameter]:
    """The trainable parameters that maps depend on."""
    parameters = [parameter for parameter in body.parameters() if parameter.requires_grad]
    maps = [feature.sum() for feature in maps if feature.requires_grad]
    if not (parameters and maps):
        return set()
    gradients = torch.autograd.grad(maps, parameters, retain_graph=True, allow_unused=True)
    return {p for p, gradient in zip(parameters, gradients) if gradient is not None}
