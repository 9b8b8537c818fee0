"""Convert other implementations' weights to ours."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor, nn

from ..errors import WeightsError
from ..labels import first_line
from .mismatch import describe_mismatch
from .rules import Source, rename
from .sources import SOURCES, recognise
from .transforms import Weight, Weights, add

logger = logging.getLogger("lite_detr")

# The only weights whose shapes depend on the number of classes.
CLASS_WEIGHT = re.compile(
    r"(decoder\.heads|encoder_heads|queries)\.class_embed\.|(denoising|queries)\.label_embed\."
)
# The references have a channel for each of COCO's category ids, 0 to 90, of which 80 are in use;
# Detectron2 numbers these 80 in their order.
COCO_CATEGORY_IDS = tuple(category["id"] for category in COCO_CATEGORIES if category["isthing"])
NUM_COCO_IDS = max(COCO_CATEGORY_IDS) + 1
# What a file may lack, since every model makes the same.
OWN = (
    (r".+\.relative_position_index", "a table of positions that every Swin Transformer makes"),
    (r".+\.num_batches_tracked", "a count of training steps that nothing reads"),
)
# What a file of a backbone alone may also lack.
OWN_IN_BACKBONES = (
    *OWN,
    (r"backbone\.norm\d\.(weight|bias)", "a norm that classifiers do not have"),
    (r"backbone\.fpn_.+", "the pyramid around a ResNet, which classifiers do not have"),
)
# What a file may have and the model not, by our names.
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
# What wrappers of a model put before each of its names, and what they put before the names of a
# part that they wrap: torch.compile, FSDP and activation checkpointing.
PREFIXES = ("module.", "model.")
INFIX = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What a module that holds a model and its moving average calls either.
AVERAGE_PREFIXES = ("ema_model.", "model_ema.", "ema.", "teacher.")
MODEL_PREFIXES = (*PREFIXES, "net.", "detector.", "student.")
MAX_NAME = 300  # characters


class Conversion(NamedTuple):
    """Converted weights and what became of every key.

    Attributes:
        state_dict: the weights by our names, in the model's shapes.
        source: the name of the implementation that they come from.
        used: our names, with the file's keys that they came from.
        ignored: the file's keys that are not needed, with the reason.
        own: our names that keep the model's value, with the reason.
        num_classes: the number of classes in the file; None for a backbone.
        renewed: those names of ``own`` that keep their value because the classes differ.
        added: our names whose weights the source's code has only in effect, with the reason.
        losses: constants of the losses in which the model differs from the source's code.
    """

    state_dict: dict[str, Tensor]
    source: str
    used: dict[str, tuple[str, ...]]
    ignored: dict[str, str]
    own: dict[str, str]
    num_classes: int | None
    renewed: tuple[str, ...]
    added: dict[str, str]
    losses: tuple[str, ...]

    def summary(self) -> str:
        """Return the account in a few lines."""
        keys = {key for keys in self.used.values() for key in keys}
        lines = [f"{self.source}: {len(keys)} keys used for {len(self.used)} weights"]
        accounts = {"omitted": self.ignored, "added": self.added, "not in the file": self.own}
        for title, reasons in accounts.items():
            for reason, count in Counter(reasons.values()).items():
                example = next(name for name, why in reasons.items() if why == reason)
                lines.append(f"  {title}: {count} such as {example} ({reason})")
        lines += [f"  in the losses: {difference}" for difference in self.losses]
        return "\n".join(lines)

    def table(self) -> str:
        """Return the account with a line for every key."""
        lines = [f"{' = '.join(keys)} -> {name}" for name, keys in self.used.items()]
        lines += [f"{key}: omitted ({reason})" for key, reason in self.ignored.items()]
        lines += [f"{name}: added ({reason})" for name, reason in self.added.items()]
        lines += [f"{name}: not in the file ({reason})" for name, reason in self.own.items()]
        return "\n".join(lines)


def convert(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Convert the weights of another implementation to a model's names and shapes.

    Args:
        state_dict: tensors or arrays by the names of one of the implementations in ``sources.py``.
        model: a detector of this package.

    Returns:
        A state dict for ``model.load_state_dict``: a complete one from a detector's weights, the
        backbone's part from a backbone's. From 91 classes to 80, rows are gathered by COCO's
        category ids; for other numbers, the class heads are the model's own, and a warning says so.

    Raises:
        WeightsError: the implementation is unknown, or the weights do not fit the model; the
            message names keys that are left over or missing, and the config that would fit.
    """
    conversion = convert_weights(state_dict, model)
    logger.info("%s", conversion.summary())
    if conversion.renewed:
        logger.warning(
            "weights are for %d classes, the model has %d: its class heads are re-initialised",
            conversion.num_classes,
            model.num_classes,
        )
    return conversion.state_dict


def convert_weights(state_dict: Mapping[str, Any], model: nn.Module) -> Conversion:
    """Convert as :func:`convert` does, but return the account of every key and log nothing."""
    given = as_tensors(state_dict)
    source = recognise(given)
    if source is None:
        raise WeightsError(
            f"weights belong to no known implementation, their keys begin with {list(given)[:3]}; "
            f"known are {', '.join(known.name for known in SOURCES)}. Weights of lite_detr itself "
            "need no conversion: load them by lite_detr.checkpoint.DetrCheckpointer"
        )
    if source.refusal:
        raise WeightsError(f"weights of {source.name} cannot be converted: {source.refusal}")
    weights, ignored, left = to_our_names(given, source)
    mine = model.state_dict()
    is_backbone = all(name.startswith("backbone.") for name in weights)
    if is_backbone and any(name.startswith(BOTTOM_UP) for name in mine):
        weights = {name.replace("backbone.", BOTTOM_UP, 1): w for name, w in weights.items()}
    theirs = {name: weight.value for name, weight in weights.items()}
    classes = count_classes(theirs, model)
    fitted = theirs if classes is None else adapt_classes(theirs, model)

    used: dict[str, tuple[str, ...]] = {}
    added: dict[str, str] = {}
    for name, weight in weights.items():
        if name in fitted and name in mine:
            used[name] = weight.keys
            if weight.reason:
                added[name] = weight.reason
        elif cause := omission_reason(name, fitted, mine):
            ignored |= dict.fromkeys(weight.keys, cause)
        else:
            left += weight.keys
    own: dict[str, str] = {}
    missing: list[str] = []
    for name in mine:
        if name in used or (is_backbone and not name.startswith("backbone.")):
            continue
        if cause := own_reason(name, theirs, fitted, is_backbone):
            own[name] = cause
        else:
            missing.append(name)
    misshapen = [name for name in used if fitted[name].shape != mine[name].shape]
    unfit = [setting for setting in source.settings if not setting.fits(model)]
    constants = [setting for setting in unfit if not setting.in_losses]
    if left or missing or misshapen or constants:
        raise WeightsError(
            describe_mismatch(
                source,
                left,
                missing,
                misshapen,
                [setting.describe(model) for setting in constants],
                shapes(theirs),
                shapes(mine),
            )
        )
    return Conversion(
        state_dict={n: fitted[n] if n in used else mine[n] for n in mine if n in used | own},
        source=source.name,
        used={name: keys for name, keys in used.items() if name not in added},
        ignored=ignored,
        own=own,
        num_classes=classes,
        renewed=tuple(name for name, cause in own.items() if cause == OTHER_CLASSES),
        added=added,
        losses=tuple(setting.describe(model) for setting in unfit if setting.in_losses),
    )


def as_tensors(state_dict: Any, name: str = "weights") -> dict[str, Tensor]:
    """Return a state dict of tensors, without the prefixes that wrappers of a model add.

    Args:
        state_dict: tensors or arrays by name.
        name: what to call them in errors.

    Raises:
        WeightsError: it is something else, or holds what cannot be a weight.
    """
    if not isinstance(state_dict, Mapping):
        raise WeightsError(
            f"{name} must be a dict of tensors by name, got {type(state_dict).__name__}"
        )
    for key, value in state_dict.items():
        if not isinstance(key, str) or len(key) > MAX_NAME or not key.isprintable():
            raise WeightsError(
                f"{name} must be a dict of tensors by name, got the key {first_line(repr(key), 60)}"
            )
        if problem := value_problem(value):
            raise WeightsError(
                f"{name} must be a dict of tensors by name, got {problem} for {key!r}"
            )
    tensors = {key: torch.as_tensor(value) for key, value in state_dict.items()}
    # A count that PyTorch keeps beside the names of an average, which have a prefix.
    if set(tensors) != {"n_averaged"} and all(
        key == "n_averaged" or key.startswith("module.") for key in tensors
    ):
        tensors.pop("n_averaged", None)
    return strip_prefixes(tensors)


def value_problem(value: Any) -> str:
    """Return what a value is if it cannot be a weight; empty if it can."""
    if isinstance(value, np.ndarray):
        return "" if value.dtype.kind in "biuf" else f"an array of {value.dtype}"
    if not isinstance(value, Tensor):
        return f"a value of type {type(value).__name__}"
    if value.layout != torch.strided or value.is_quantized:
        return "a sparse or quantized tensor"
    if value.is_meta:
        return "a tensor without values"
    return "a complex tensor" if value.is_complex() else ""


def strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove what wrappers add to names, unless an implementation is known by it.

    If only some names have a prefix that makes them known, as in the file of a module that holds a
    model, its moving average and metrics, these are the weights, those of an average first.
    """
    tensors = {INFIX.sub("", key): value for key, value in tensors.items()}
    while tensors:
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in tensors)), "")
        # The names of transformers, which has heads as we do but calls them differently.
        ours = any(key.startswith(f"{prefix}decoder.heads.") for key in tensors)
        if not prefix or not (ours or recognise(tensors) is None):
            break
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    if is_known(tensors):
        return tensors
    for prefix in (*AVERAGE_PREFIXES, *MODEL_PREFIXES):
        part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if part and is_known(part := strip_prefixes(part)):
            kind = "the moving average" if prefix in AVERAGE_PREFIXES else "the weights"
            left = len(tensors) - len(part)
            logger.info("using %s under the names %s*, without %d others", kind, prefix, left)
            return part
    return tensors


def is_known(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether names are those of a detector of ours, or of an implementation that we know."""
    ours = "level_embed" in tensors and any(key.startswith("decoder.heads.") for key in tensors)
    return ours or recognise(tensors) is not None


def to_our_names(
    given: Mapping[str, Tensor], source: Source
) -> tuple[Weights, dict[str, str], list[str]]:
    """Apply a source's rules, and what names alone do not tell.

    Returns:
        The weights by our names; the keys that are not needed, with the source's reason; and the
        keys that the source has no rule for.
    """
    weights: Weights = {}
    ignored: dict[str, str] = {}
    left: list[str] = []
    for key, value in given.items():
        name = rename(key, source.rules)
        if name is not None:
            add(weights, name, Weight(value, (key,)))
        elif cause := reason(key, source.ignored):
            ignored[key] = cause
        else:
            left.append(key)
    for transform in source.transforms:
        weights = transform(weights)
    return weights, ignored, left


def reason(name: str, reasons: Iterable[tuple[str, str]]) -> str | None:
    """Return the reason of the first pattern that a whole name matches."""
    return next((cause for pattern, cause in reasons if re.fullmatch(pattern, name)), None)


def omission_reason(
    name: str, fitted: Mapping[str, Tensor], mine: Mapping[str, Tensor]
) -> str | None:
    """Return why a weight of the file may go unused; None if it may not."""
    if name in mine:
        return OTHER_CLASSES
    # Lite-DINO builds the projections of key-aware attention for plain attention also.
    if match := KEY_AWARE_PROJECTION.fullmatch(name):
        plain = f"{match[1]}.attention_weights.weight"
        return KEY_AWARE_ONLY if plain in fitted and plain in mine else None
    return reason(name, NOT_NEEDED)


def own_reason(
    name: str, theirs: Mapping[str, Tensor], fitted: Mapping[str, Tensor], is_backbone: bool
) -> str | None:
    """Return why a weight of the model may keep its value; None if it may not."""
    if name in theirs and name not in fitted:
        return OTHER_CLASSES
    return reason(name, OWN_IN_BACKBONES if is_backbone else OWN)


def shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}


def count_classes(weights: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """Return the number of classes of the decoder's first head; None without one."""
    head = weights.get("decoder.heads.class_embed.0.bias")
    return None if head is None else len(head) - count_no_object(model)


def count_no_object(model: nn.Module) -> int:
    """Return the number of channels for "no object", the last ones of a detector's class heads."""
    heads = model.state_dict().get("decoder.heads.class_embed.0.bias")
    return 0 if heads is None else len(heads) - model.num_classes


def adapt_classes(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring the class weights of a detector to a model's number of classes.

    Args:
        weights: all weights of a file, by our names.
        model: the detector. If its proposals are class-agnostic, the first channels of their head
            are kept, of which the first means "any object"; otherwise its channels are classes.

    Returns:
        All weights, with class weights for the model's classes. These are omitted unless the
        classes are known to be the same: for equal counts, and from COCO's 91 category ids to its
        80 classes.
    """
    given, no_object = count_classes(weights, model), count_no_object(model)
    if given == model.num_classes:
        by_class = torch.arange(given)
    elif (given, model.num_classes) == (NUM_COCO_IDS, len(COCO_CATEGORY_IDS)):
        by_class = torch.tensor(COCO_CATEGORY_IDS)
    else:
        return {name: value for name, value in weights.items() if not CLASS_WEIGHT.match(name)}
    class_agnostic = getattr(model.queries, "class_agnostic", False)

    def adapt(name: str, value: Tensor) -> Tensor:
        if not CLASS_WEIGHT.match(name):
            return value
        if "label_embed" in name:
            # The last row stands for no class.
            return torch.cat([value[by_class], value[-1:]])
        if name.startswith("queries.") and class_agnostic:
            return value[: model.num_classes]
        return torch.cat([value[by_class], value[len(value) - no_object :]])

    return {name: adapt(name, value) for name, value in weights.items()}
