"""Rules that rename weights, and the names of backbones, which several implementations share.

A rule is a regular expression for a whole name and a template for ours, in which ``{1}`` is the
first group; ``{1+2}`` adds to a number and ``{1*2}`` multiplies it. The first rule that matches
counts.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from .settings import Setting
from .transforms import TRANSFORMS, Weights

FIELD = re.compile(r"\{(\d)(?:([+*])(\d))?\}")


class Rule(NamedTuple):
    """The name ``pattern`` of another implementation is ``template`` here."""

    pattern: re.Pattern[str]
    template: str

    def apply(self, name: str) -> str | None:
        """Return our name, or None if the rule does not match ``name``."""
        match = self.pattern.fullmatch(name)
        if match is None:
            return None

        def fill(field: re.Match[str]) -> str:
            group, operator, number = field.groups()
            text = match[int(group)]
            if operator is None:
                return text
            return str(int(text) + int(number) if operator == "+" else int(text) * int(number))

        return FIELD.sub(fill, self.template)


def table(*rows: tuple[str, str], prefix: str = "", ours: str = "") -> tuple[Rule, ...]:
    """Return rules from (pattern, template), with the prefixes of all names there and here."""
    return tuple(Rule(re.compile(prefix + pattern), ours + name) for pattern, name in rows)


def rename(name: str, rules: Sequence[Rule]) -> str | None:
    """Return our name by the first rule that matches, or None."""
    return next((ours for rule in rules if (ours := rule.apply(name)) is not None), None)


# Backbones. torchvision and timm use the same names in a ResNet.
TORCHVISION_RESNET = (
    (r"conv1\.weight", "stem.conv1.weight"),
    (r"bn1\.(\w+)", "stem.conv1.norm.{1}"),
    (r"layer(\d)\.(\d+)\.conv(\d)\.weight", "res{1+1}.{2}.conv{3}.weight"),
    (r"layer(\d)\.(\d+)\.bn(\d)\.(\w+)", "res{1+1}.{2}.conv{3}.norm.{4}"),
    (r"layer(\d)\.(\d+)\.downsample\.0\.weight", "res{1+1}.{2}.shortcut.weight"),
    (r"layer(\d)\.(\d+)\.downsample\.1\.(\w+)", "res{1+1}.{2}.shortcut.norm.{3}"),
)
TRANSFORMERS_RESNET = (
    (r"embedder\.embedder\.convolution\.weight", "stem.conv1.weight"),
    (r"embedder\.embedder\.normalization\.(\w+)", "stem.conv1.norm.{1}"),
    (
        r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.convolution\.weight",
        "res{1+2}.{2}.conv{3+1}.weight",
    ),
    (
        r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.normalization\.(\w+)",
        "res{1+2}.{2}.conv{3+1}.norm.{4}",
    ),
    (
        r"encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.convolution\.weight",
        "res{1+2}.{2}.shortcut.weight",
    ),
    (
        r"encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.normalization\.(\w+)",
        "res{1+2}.{2}.shortcut.norm.{3}",
    ),
)
DETECTRON2_RESNET = ((r"((?:stem\.conv|res\d).+)", "{1}"),)
SWIN = ((r"((?:patch_embed|layers|norm\d)\..+)", "{1}"),)


class Source(NamedTuple):
    """An implementation whose weights can be converted.

    Attributes:
        name: what messages call it.
        marks: patterns; some key of its weights begins with each of them.
        rules: from its names to ours.
        ignored: patterns of keys that have no counterpart here, with the reason.
        settings: the constants of its code.
        transforms: what converts names that the rules leave unfinished, in order.
        note: what weights that fit several configs do not tell; empty if they tell all.
        refusal: why its weights cannot be converted; empty if they can.
    """

    name: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]
    ignored: tuple[tuple[str, str], ...] = ()
    settings: tuple[Setting, ...] = ()
    transforms: tuple[Callable[[Weights], Weights], ...] = TRANSFORMS
    note: str = ""
    refusal: str = ""

    def recognises(self, keys: Collection[str]) -> bool:
        return all(any(re.match(mark, key) for key in keys) for mark in self.marks)
