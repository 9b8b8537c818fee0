"""From other implementations' weights to ours."""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import WeightsError
from .heads import adapt_classes, count_classes
from .mismatch import describe_mismatch
from .report import Conversion
from .rules import rename
from .sources import SOURCES, Source, recognise
from .transforms import TRANSFORMS, Weight, Weights, add

logger = logging.getLogger("lite_detr")

# What a file may lack, since every model makes it alike.
OWN = (
    (r".+\.relative_position_index", "a table of positions that every Swin Transformer makes"),
    (r".+\.num_batches_tracked", "a count of training steps that nothing reads"),
)
# What a file of a backbone alone may lack besides.
OWN_IN_BACKBONES = (
    *OWN,
    (r"backbone\.norm\d\.(weight|bias)", "a norm that classifiers do not have"),
    (r"backbone\.fpn_.+", "the pyramid around a ResNet, which classifiers do not have"),
)
# What a model may lack of a file, by our names.
NOT_NEEDED = (
    (r".+\.num_batches_tracked", "a count of training steps that nothing reads"),
    (r".+\.attn_mask", "a mask for one size of image; the model makes its own"),
    (r"denoising\.label_embed\.weight", "only for training with denoising, which the model lacks"),
)
# Where Detectron2's FPN keeps the backbone below the pyramid.
BOTTOM_UP = "backbone.bottom_up."
KEY_AWARE_PROJECTION = re.compile(r"(.+_attn)\.(?:query|key)_proj\.(?:weight|bias)")
KEY_AWARE_ONLY = "only for key-aware attention; the reference does not use it in plain attention"
OTHER_CLASSES = "for other classes than the model has"


def convert(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights of another implementation -> those of a model, by our names and in its shapes.

    Args:
        state_dict: the weights, tensors or arrays, of one of the implementations that
            ``sources.py`` lists.
        model: a detector of this package.

    Returns:
        A state dict for ``model.load_state_dict``: a whole one from a detector's weights, the
        backbone's part from a backbone's. From 91 classes to 80, rows are gathered by COCO's
        category ids; where the numbers differ otherwise, the class heads are the model's own, and
        a warning says so.

    Raises:
        WeightsError: the weights are of no known implementation, or do not fit the model; the
            message names keys that were left over or missing, and the config that would fit.
    """
    conversion = convert_weights(state_dict, model)
    logger.info("%s", conversion.summary())
    if conversion.renewed:
        logger.warning(
            "weights are for %d classes, the model has %d: its class heads start anew",
            conversion.num_classes,
            model.num_classes,
        )
    return conversion.state_dict


def convert_weights(state_dict: Mapping[str, Any], model: nn.Module) -> Conversion:
    """As :func:`convert`, but with the account of every key and without a word to the log."""
    given = as_tensors(state_dict)
    source = recognise(given)
    if source is None:
        raise WeightsError(
            f"weights are of no known implementation, their keys begin with {list(given)[:3]}; "
            f"known are {', '.join(known.name for known in SOURCES)}. Weights of lite_detr itself "
            "need no conversion: load them by lite_detr.checkpoint.DetrCheckpointer"
        )
    weights, ignored, left = to_our_names(given, source)
    mine = model.state_dict()
    is_backbone = all(name.startswith("backbone.") for name in weights)
    if is_backbone and any(name.startswith(BOTTOM_UP) for name in mine):
        weights = {name.replace("backbone.", BOTTOM_UP, 1): w for name, w in weights.items()}
    theirs = {name: weight.value for name, weight in weights.items()}
    classes = count_classes(theirs)
    fitted = theirs if classes is None else adapt_classes(theirs, model)

    used: dict[str, tuple[str, ...]] = {}
    for name, weight in weights.items():
        if name in fitted and name in mine:
            used[name] = weight.keys
        elif why := why_left_out(name, fitted, mine):
            ignored |= dict.fromkeys(weight.keys, why)
        else:
            left += weight.keys
    own: dict[str, str] = {}
    missing: list[str] = []
    for name in mine:
        if name in used or (is_backbone and not name.startswith("backbone.")):
            continue
        if why := why_own(name, theirs, fitted, is_backbone):
            own[name] = why
        else:
            missing.append(name)
    misshapen = [name for name in used if fitted[name].shape != mine[name].shape]
    if left or missing or misshapen:
        raise WeightsError(
            describe_mismatch(source.name, left, missing, misshapen, shapes(theirs), shapes(mine))
        )
    return Conversion(
        state_dict={n: fitted[n] if n in used else mine[n] for n in mine if n in used | own},
        source=source.name,
        used=used,
        ignored=ignored,
        own=own,
        num_classes=classes,
        renewed=tuple(name for name, why in own.items() if why == OTHER_CLASSES),
    )


def as_tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict of tensors, without the prefix that data parallel training gives its keys.

    Raises:
        WeightsError: it is none.
    """
    if not isinstance(state_dict, Mapping):
        raise WeightsError(
            f"weights must be a dict of tensors by name, got {type(state_dict).__name__}"
        )
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, (Tensor, np.ndarray)):
            raise WeightsError(
                f"weights must be a dict of tensors by name, got {type(value).__name__} for {key!r}"
            )
    prefix = "module." if all(key.startswith("module.") for key in state_dict) else ""
    return {key.removeprefix(prefix): torch.as_tensor(v) for key, v in state_dict.items()}


def to_our_names(
    given: Mapping[str, Tensor], source: Source
) -> tuple[Weights, dict[str, str], list[str]]:
    """Applies a source's rules and what names alone do not tell.

    Returns:
        The weights by our names, the keys that the source says are of no use with the reason, and
        those that it says nothing about.
    """
    weights: Weights = {}
    ignored: dict[str, str] = {}
    left: list[str] = []
    for key, value in given.items():
        name = rename(key, source.rules)
        if name is not None:
            add(weights, name, Weight(value, (key,)))
        elif why := reason(key, source.ignored):
            ignored[key] = why
        else:
            left.append(key)
    for transform in TRANSFORMS:
        weights = transform(weights)
    return weights, ignored, left


def reason(name: str, reasons: Iterable[tuple[str, str]]) -> str | None:
    """What the first pattern that a whole name matches says about it."""
    return next((why for pattern, why in reasons if re.fullmatch(pattern, name)), None)


def why_left_out(name: str, fitted: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> str | None:
    """Why a weight of the file may go unused, if it may."""
    if name in mine:
        return OTHER_CLASSES
    # Lite-DINO also builds the projections of key-aware attention where its attention is plain.
    if match := KEY_AWARE_PROJECTION.fullmatch(name):
        plain = f"{match[1]}.attention_weights.weight"
        return KEY_AWARE_ONLY if plain in fitted and plain in mine else None
    return reason(name, NOT_NEEDED)


def why_own(
    name: str, theirs: Mapping[str, Tensor], fitted: Mapping[str, Tensor], is_backbone: bool
) -> str | None:
    """Why a weight of the model may keep its value, if it may."""
    if name in theirs and name not in fitted:
        return OTHER_CLASSES
    return reason(name, OWN_IN_BACKBONES if is_backbone else OWN)


def shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}
