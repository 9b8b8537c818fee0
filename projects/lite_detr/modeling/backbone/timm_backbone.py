"""Any convolutional or hierarchical model of timm as a Detectron2 backbone."""

from collections.abc import Mapping, Sequence

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn


class TimmBackbone(Backbone):
    """Feature maps of a timm model, named ``stride8``, ``stride16`` and so on.

    Args:
        model_name: a model that ``timm.create_model(..., features_only=True)`` can make.
        out_strides: the strides of the maps to give.
        pretrained: let timm download its weights.
        state_dict: weights in the names of the whole timm model instead, such as
            :func:`efficientnet_lite0_state_dict` makes; what the maps do not need is left.
        frozen_norm: keep batch norms as they were pretrained: neither statistics nor weights train.
        frozen_stride: weights that the map of this stride, and so every finer one, is made with do
            not train; 0 trains all.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: the model has no map of a stride in ``out_strides``.
    """

    def __init__(
        self,
        model_name: str,
        out_strides: Sequence[int] = (8, 16, 32),
        pretrained: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        frozen_norm: bool = True,
        frozen_stride: int = 0,
    ):
        super().__init__()
        try:
            import timm
        except ModuleNotFoundError:
            raise ModuleNotFoundError("TimmBackbone needs timm: run `pip install timm`") from None

        feature_info = timm.create_model(model_name, features_only=True).feature_info
        reductions = feature_info.reduction()
        asked = [*out_strides, frozen_stride] if frozen_stride else out_strides
        missing = [stride for stride in asked if stride not in reductions]
        if missing:
            raise ValueError(
                f"{model_name} has no feature map of stride {missing}; it offers {reductions}"
            )
        self.body = timm.create_model(
            model_name,
            features_only=True,
            out_indices=[reductions.index(stride) for stride in out_strides],
            pretrained=pretrained,
        )
        self._shapes = {
            f"stride{stride}": ShapeSpec(channels=channels, stride=stride)
            for stride, channels in zip(out_strides, self.body.feature_info.channels())
        }
        if state_dict is not None:
            own = self.body.state_dict()
            self.body.load_state_dict({name: state_dict[name] for name in own})
        self._frozen_norms = [
            module
            for module in self.body.modules()
            if frozen_norm and isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        for norm in self._frozen_norms:
            norm.requires_grad_(False)
        if frozen_stride:
            self._freeze(feature_info.module_name()[reductions.index(frozen_stride)])
        self.train(self.training)

    def _freeze(self, last_module: str) -> None:
        """Freezes the weights up to the last of a module; timm lists them in forward order."""
        parameters = list(self.body.named_parameters())
        inside = [name.startswith(f"{last_module}.") for name, _ in parameters]
        for _, parameter in parameters[: len(inside) - inside[::-1].index(True)]:
            parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "TimmBackbone":
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``[B, 3, H, W]`` -> maps by name, ``[B, C_l, H / stride, W / stride]``."""
        return dict(zip(self._shapes, self.body(images)))
