"""Project the backbone's feature maps to one width, and add the coarser scales."""

from collections.abc import Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from ..errors import ConfigError

DEFAULT_STRIDES = (8, 16, 32)
NUM_GROUPS = 32


class MultiScaleNeck(nn.Module):
    """1x1 convolutions on the backbone's maps, 3x3 convolutions of stride 2 for coarser scales.

    As in Deformable DETR (appendix A.4.1), the first added scale is made from the backbone's last
    map, each further one from the scale before it. Every scale ends in a group normalisation.

    Args:
        input_shape: the backbone's ``output_shape()``.
        in_features: names of the maps to use; None selects those with strides 8, 16 and 32, as far
            as the backbone goes.
        embed_dim: channels ``C`` of every scale, a multiple of 32.
        num_levels: the number of scales ``L``, at least the number of maps.

    Attributes:
        coarsest_stride: the largest stride of the backbone's maps and of the scales.

    Raises:
        ConfigError: the backbone lacks a map or a stride, or a number is out of its range.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        in_features: Sequence[str] | None,
        embed_dim: int,
        num_levels: int,
    ):
        super().__init__()
        if embed_dim % NUM_GROUPS:
            raise ConfigError(f"embed_dim must be a multiple of {NUM_GROUPS}, got {embed_dim}")
        self.in_features = select_features(input_shape, in_features)
        if num_levels < len(self.in_features):
            raise ConfigError(
                f"num_levels is {num_levels}, but there are {len(self.in_features)} input maps "
                f"{self.in_features}: raise num_levels or name fewer in_features"
            )
        channels = [input_shape[name].channels for name in self.in_features]
        self.lateral_convs = nn.ModuleList(
            _conv_norm(in_channels, embed_dim, kernel_size=1) for in_channels in channels
        )
        self.extra_convs = nn.ModuleList(
            _conv_norm(in_channels, embed_dim, kernel_size=3, stride=2, padding=1)
            for in_channels in (
                [channels[-1]] + [embed_dim] * (num_levels - len(channels) - 1)
                if num_levels > len(channels)
                else []
            )
        )

        self.coarsest_stride = max(
            *(shape.stride for shape in input_shape.values()),
            input_shape[self.in_features[-1]].stride * 2 ** len(self.extra_convs),
        )

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Maps by name, ``[B, C_l, H_l, W_l]`` -> ``L`` maps ``[B, C, H_l, W_l]``, finest first."""
        maps = [conv(features[name]) for conv, name in zip(self.lateral_convs, self.in_features)]
        last = features[self.in_features[-1]]
        for conv in self.extra_convs:
            last = conv(last)
            maps.append(last)
        return maps


def extract_maps(backbone: Backbone, neck: MultiScaleNeck, images: Tensor) -> list[Tensor]:
    """Return the maps of all scales, computed in float32 if 16 bits would get them wrong.

    With AMX instructions, PyTorch's bfloat16 convolutions of a stride above 1 leave a part of their
    result unwritten if it has one column, and so do the gradients of their weights: what was in
    that memory before is taken for features. docs/troubleshooting.md shows it.
    """
    in_16_bits = images.device.type == "cpu" and (
        images.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")
    )
    if not in_16_bits or images.shape[-1] >= 2 * neck.coarsest_stride:
        return neck(backbone(images))
    with torch.autocast("cpu", enabled=False):
        features = call_in_float32(backbone, images.float())
        return [feature_map.to(images.dtype) for feature_map in call_in_float32(neck, features)]


def call_in_float32(module: nn.Module, inputs: object) -> object:
    """Call a module as if its weights were float32."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    lower = {
        name: value.float()
        for name, value in state.items()
        if value.dtype in (torch.bfloat16, torch.float16)
    }
    return torch.func.functional_call(module, lower, (inputs,)) if lower else module(inputs)


def select_features(
    input_shape: Mapping[str, ShapeSpec], in_features: Sequence[str] | None
) -> list[str]:
    """Return the names of the maps to use, high resolution first.

    Unless ``in_features`` names them, those of strides 8, 16 and 32, as far as the backbone goes.

    Raises:
        ConfigError: there is no map of stride 8, a gap after it, or several maps of one stride; the
            backbone has no map of a name; or the maps named do not go from fine to coarse.
    """
    offer = ", ".join(f"{name} (stride {spec.stride})" for name, spec in input_shape.items())
    if in_features is not None:
        missing = [name for name in in_features if name not in input_shape]
        if missing:
            raise ConfigError(f"the backbone has no feature {missing}; it offers {offer}")
        strides = [input_shape[name].stride for name in in_features]
        if sorted(set(strides)) != strides:
            raise ConfigError(
                f"in_features must go from fine to coarse with one map per stride, got "
                f"{list(in_features)} with strides {strides}; the backbone offers {offer}"
            )
        return list(in_features)
    by_stride = {
        stride: [name for name, spec in input_shape.items() if spec.stride == stride]
        for stride in DEFAULT_STRIDES
    }
    last = max((stride for stride, names in by_stride.items() if names), default=0)
    selected = []
    for stride, names in by_stride.items():
        # The neck adds scales after the last map, but none before or between maps.
        if len(names) > 1 or (not names and (stride == DEFAULT_STRIDES[0] or stride < last)):
            raise ConfigError(
                f"cannot choose a feature map of stride {stride}: {len(names)} have it; "
                f"the backbone offers {offer}. Name the maps to use in in_features"
            )
        selected += names
    return selected


def _conv_norm(in_channels: int, embed_dim: int, **conv) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, embed_dim, **conv)
    nn.init.xavier_uniform_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    return nn.Sequential(convolution, MapNorm(NUM_GROUPS, embed_dim))


class MapNorm(nn.GroupNorm):
    """A group norm that also accepts a map of one cell with one channel per group.

    ``nn.GroupNorm`` refuses it, as there is nothing to average over; here the result is the bias.
    """

    def forward(self, feature_map: Tensor) -> Tensor:
        return torch.group_norm(feature_map, self.num_groups, self.weight, self.bias, self.eps)
