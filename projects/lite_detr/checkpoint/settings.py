"""What the code of another implementation computes with, and no weight tells.

Two detectors whose weights have the same names and shapes may still differ in constants: how
positions are encoded, where references are clamped, how images are normalised. Weights are
converted only for a model that has the constants of the code that they were trained with.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn


class Setting(NamedTuple):
    """Constants that belong together.

    Attributes:
        names: attributes of a detector, which are its options after ``model.`` as well.
        accepted: the values that they may have together.
        in_losses: True if only the losses depend on them. A training run may choose these, so
            other values are reported, and are not an error.
    """

    names: tuple[str, ...]
    accepted: tuple[tuple[Any, ...], ...]
    in_losses: bool = False

    def read(self, model: nn.Module) -> tuple[Any, ...] | None:
        """Return a detector's values; None if it lacks one, or is built without memory."""
        values = []
        for name in self.names:
            value: Any = model
            for part in name.split("."):
                value = getattr(value, part, None)
            if isinstance(value, Tensor):
                if value.is_meta:
                    return None
                value = tuple(round(number, 3) for number in value.flatten().tolist())
            if value is None:
                return None
            values.append(value)
        return tuple(values)

    def fits(self, model: nn.Module) -> bool:
        values = self.read(model)
        return values is None or values in self.accepted

    def describe(self, model: nn.Module) -> str:
        """Describe both sides, for a detector that does not fit."""
        mine = ", ".join(map(str, self.read(model) or ()))
        theirs = " or ".join(", ".join(map(str, values)) for values in self.accepted)
        return f"{', '.join(self.names)} {theirs} in their code and {mine} in the model"

    def options(self) -> list[str]:
        """Return the command line options that set the first of the accepted values."""
        return [
            f"model.{name}={list(value) if isinstance(value, tuple) else value}".replace(" ", "")
            for name, value in zip(self.names, self.accepted[0])
        ]


def images() -> Setting:
    """RGB, normalised by ImageNet's mean and standard deviation."""
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    return Setting(("pixel_mean", "pixel_std", "input_format"), ((mean, std, "RGB"),))


def positions(*accepted: tuple[float, float]) -> Setting:
    """Temperature and offset of the sine encoding of positions."""
    return Setting(("position_encoding.temperature", "position_encoding.offset"), accepted)


def borders(border: float, prediction_border: float | None = None) -> Setting:
    """The clamps of references, see ``PredictionHeads``; of predictions as well, unless given."""
    predictions = border if prediction_border is None else prediction_border
    return Setting(
        ("decoder.heads.border", "decoder.heads.prediction_border"), ((border, predictions),)
    )


def losses(*weight_class: float, giou_eps: float, log_eps: float = 1e-8) -> tuple[Setting, ...]:
    """The epsilons of the criterion and its matcher, and the weights that the class loss has."""
    names = ("criterion.giou_eps", "criterion.matcher.giou_eps", "criterion.matcher.log_eps")
    return (
        Setting(names, ((giou_eps, giou_eps, log_eps),), in_losses=True),
        Setting(("criterion.weight_class",), tuple((w,) for w in weight_class), in_losses=True),
    )
