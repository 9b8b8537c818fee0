"""Changes ``key=value`` of lazy configs, whose keys have to be there.

Detectron2 takes any key, and adds it where it is not there, so that a slip of the pen would change
nothing and nobody would be told.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence

from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from .errors import ConfigError
from .model_zoo import get_config


def load_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """A lazy config with changes.

    Args:
        name: see :func:`lite_detr.model_zoo.get_config`.
        overrides: see :func:`apply_overrides`.

    Raises:
        MissingFileError: there is no such config.
        ConfigError: it is a YAML file, or a change does not fit it.
    """
    return apply_overrides(get_config(name), overrides)


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Changes a config in place, as Detectron2's ``LazyConfig.apply_overrides`` does.

    A key has to be in the config, or to be an argument of what the config calls there; one that is
    to be added nevertheless has a plus before it, as Hydra has it.

    Args:
        overrides: ``key=value`` or ``+key=value``.

    Raises:
        ConfigError: a key is not there, or a change cannot be read or made.
    """
    unknown = {}
    for override in overrides:
        key, is_setting, _ = override.partition("=")
        if override.startswith("-") or not (is_setting or override.startswith("~")):
            raise ConfigError(
                f"{override} is no key=value, as all that follows the first one has to be: give "
                "options of the program before it"
            )
        place = None if override[0] in "+~" else first_missing(cfg, key)
        if place is not None:
            unknown[key] = place, nearest_key(cfg, key)
        try:
            LazyConfig.apply_overrides(cfg, [override])
        except Exception as error:
            # The parser, OmegaConf and Detectron2 have errors of their own, of several lines.
            reason = str(error.args[0] if error.args else error).splitlines()[0]
            raise ConfigError(
                unknown_key(key, unknown[key][1])
                if key in unknown
                else f"{override} cannot be applied: {reason}"
            ) from error
        if key.endswith("_target_"):
            check_target(override, OmegaConf.select(cfg, key.lstrip("+")))
    for key, (place, nearest) in unknown.items():
        # What is called there may have been changed by a later override.
        *path, part = key.split(".")[: place + 1]
        owner = OmegaConf.select(cfg, ".".join(path)) if path else cfg
        if not (isinstance(owner, DictConfig) and takes(owner, part)):
            raise ConfigError(unknown_key(key, nearest))
    return cfg


def unknown_key(key: str, nearest: str) -> str:
    hint = f"did you mean {nearest}? " if nearest else ""
    return f"the config has no key {key}: {hint}+{key}=... would add it"


def first_missing(cfg: DictConfig, key: str) -> int | None:
    """Which part of a key is the first that is not there; None where all are."""
    node = cfg
    for place, part in enumerate(key.split(".")):
        if isinstance(node, DictConfig):
            if part not in node:
                return None if takes(node, part) else place
            node = node[part]
        elif isinstance(node, ListConfig) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        elif node is None:
            # Of what may come there nothing is known.
            return None
        else:
            return place
    return None


def takes(node: DictConfig, name: str) -> bool:
    """Whether what a node of a config calls has such an argument."""
    if node.get("_target_") is None:
        return False
    names, more = arguments_of(node["_target_"])
    return more or name in names


@functools.cache
def arguments_of(target: str | Callable) -> tuple[frozenset[str], bool]:
    """The names of a callable's arguments, and whether it takes others besides.

    A class is taken to pass what its ``__init__`` does not name on to its base.
    """
    try:
        target = locate(target) if isinstance(target, str) else target
        if not inspect.isclass(target):
            return _arguments_of(target)
        names = frozenset()
        for base in target.__mro__:
            if "__init__" in vars(base):
                own, more = _arguments_of(vars(base)["__init__"])
                names |= own
                if not more:
                    return names, False
        return names, True
    except (ImportError, TypeError, ValueError):
        # It is not there, or written in C.
        return frozenset(), True


def _arguments_of(function: Callable) -> tuple[frozenset[str], bool]:
    parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
    names = {parameter.name for parameter in parameters} - {"self"}
    return frozenset(names), any(p.kind is p.VAR_KEYWORD for p in parameters)


def check_target(override: str, target: str) -> None:
    try:
        locate(target)
    except ImportError as error:
        raise ConfigError(f"{override}: there is no {target}") from error


def nearest_key(cfg: DictConfig, key: str) -> str:
    """The key of a config that looks like one that is not there; empty where none does.

    Those with the same last part come first, as ``optimizer.lr`` for ``lr``.
    """
    keys = set(all_keys(OmegaConf.to_container(cfg, resolve=False)))
    same = [other for other in keys if other.rpartition(".")[2] == key.rpartition(".")[2]]
    close = difflib.get_close_matches(key, same, 1, cutoff=0.0)
    return (close or difflib.get_close_matches(key, keys, 1) or [""])[0]


def all_keys(node: object, prefix: str = "") -> Iterator[str]:
    """The keys of a config as a plain container, and the arguments that it does not set."""
    children = {}
    if isinstance(node, list):
        children = {str(index): child for index, child in enumerate(node)}
    elif isinstance(node, dict):
        children = node
        if node.get("_target_") is not None:
            yield from (prefix + name for name in sorted(arguments_of(node["_target_"])[0]))
    for name, child in children.items():
        yield f"{prefix}{name}"
        yield from all_keys(child, f"{prefix}{name}.")
