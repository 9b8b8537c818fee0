"""The account of a conversion."""

from collections import Counter
from typing import NamedTuple

from torch import Tensor


class Conversion(NamedTuple):
    """Converted weights and what became of every key.

    Attributes:
        state_dict: by our names, in the model's shapes.
        source: the implementation that the weights are of.
        used: our names with the file's keys that they came from.
        ignored: the file's keys that are of no use, with the reason.
        own: our names that keep the model's value, with the reason.
        num_classes: the file's; None for a backbone.
        renewed: the names among ``own`` that do so as the model has other classes.
    """

    state_dict: dict[str, Tensor]
    source: str
    used: dict[str, tuple[str, ...]]
    ignored: dict[str, str]
    own: dict[str, str]
    num_classes: int | None
    renewed: tuple[str, ...]

    def summary(self) -> str:
        """The account in a few lines."""
        keys = {key for keys in self.used.values() for key in keys}
        lines = [f"{self.source}: {len(keys)} keys used for {len(self.used)} weights"]
        for title, reasons in (("left out", self.ignored), ("not in the file", self.own)):
            for reason, count in Counter(reasons.values()).items():
                example = next(name for name, why in reasons.items() if why == reason)
                lines.append(f"  {title}: {count} such as {example} ({reason})")
        return "\n".join(lines)

    def table(self) -> str:
        """A line for every key."""
        lines = [f"{' = '.join(keys)} -> {name}" for name, keys in self.used.items()]
        lines += [f"{key}: left out ({reason})" for key, reason in self.ignored.items()]
        lines += [f"{name}: not in the file ({reason})" for name, reason in self.own.items()]
        return "\n".join(lines)
