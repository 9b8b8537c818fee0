"""Overrides ``key=value`` of lazy configs: keys must exist, and values must fit.

Detectron2 accepts any key and adds missing ones, so a misspelt key would change nothing; and it
parses every value, so a folder ``2024_01`` would become the number 202401. Here a key must be in
the config, or be an argument of what the config calls there, and it decides how its value is read.
"""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import instantiate
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError, LiteDetrError
from .labels import first_line
from .model_zoo import get_config
from .override_values import (
    ANYTHING,
    accepted_by,
    arguments_of,
    fits,
    is_called,
    read_value,
    show,
    wrong_type,
)


def load_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """Return a lazy config with overrides applied.

    Args:
        name: see :func:`lite_detr.model_zoo.get_config`.
        overrides: see :func:`apply_overrides`.

    Raises:
        MissingFileError: there is no such config.
        ConfigError: it is a YAML file, or an override does not fit it.
    """
    return apply_overrides(get_config(name), overrides)


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Change a config in place.

    A key that holds text, such as a path, takes its value as typed, without one pair of quotes
    around all of it. Other values are read as Detectron2 reads them, with Hydra's grammar, and must
    have a type that the key accepts. ``null`` is None; ``${key}`` refers to another key.

    Args:
        overrides: ``key=value``, or ``+key=value`` to add a key or to set any value.

    Raises:
        ConfigError: a key does not exist, or a value cannot be read or has another type.
    """
    unknown, references = {}, []
    for override in overrides:
        key, equals, text = override.partition("=")
        if override.startswith("~"):
            raise ConfigError(f"{show(override)}: a key cannot be deleted, only set, as to null")
        if override.startswith("-") or not (equals and key.strip("+")):
            raise ConfigError(
                f"{show(override)} is not key=value, as everything after the first one must be: "
                "put options of the program before it"
            )
        added, key = key.startswith("+"), key.lstrip("+")
        try:
            place = None if added else first_missing(cfg, key)
            if place is not None:
                unknown[key] = place, nearest_key(cfg, key)
            accepted = ANYTHING if added else accepted_by(cfg, key)
            value = read_value(key, text, accepted)
            set_value(cfg, key, value, added)
        except (ConfigError, OmegaConfBaseException) as error:
            if key in unknown:
                raise ConfigError(unknown_key(key, unknown[key][1])) from error
            raise cannot_apply(override, error) from error
        if "${" in text:
            references.append((override, key, accepted))
    for key, (place, nearest) in unknown.items():
        # A later override may have changed what is called there.
        *path, part = key.split(".")[: place + 1]
        owner = OmegaConf.select(cfg, ".".join(path)) if path else cfg
        if not (isinstance(owner, DictConfig) and has_argument(owner, part)):
            raise ConfigError(unknown_key(key, nearest))
    for override, key, accepted in references:
        try:
            value = OmegaConf.select(cfg, key)
            if OmegaConf.is_config(value):
                OmegaConf.to_container(value, resolve=True)
            elif not fits(value, accepted.types):
                raise wrong_type(key, f"{override.partition('=')[2]}, which is {value}", accepted)
        except (ConfigError, OmegaConfBaseException) as error:
            raise cannot_apply(override, error) from error
    return cfg


def build(cfg: DictConfig, key: str) -> Any:
    """Instantiate a part of a config, such as ``optimizer``.

    Raises:
        ConfigError: what it calls refuses a value.
    """
    try:
        return instantiate(OmegaConf.select(cfg, key))
    except (LiteDetrError, UnicodeError):
        raise
    except ValueError as error:
        raise ConfigError(f"{key} of the config cannot be built: {first_line(error)}") from error


def set_value(cfg: DictConfig, key: str, value: object, added: bool) -> None:
    """Set a key; a dict is merged with the keys that are there.

    Raises:
        ConfigError: a part of the key has no keys, a dict has an unknown key, or what is to be
            called does not exist.
    """
    parts = key.split(".")
    for index in range(1, len(parts)):
        path = ".".join(parts[:index])
        node = OmegaConf.select(cfg, path)
        if node is None:
            owner = OmegaConf.select(cfg, ".".join(parts[: index - 1])) if index > 1 else cfg
            # An argument that the config leaves out is not null.
            if not added and parts[index] != "_target_" and parts[index - 1] in owner:
                raise ConfigError(f"{path} is null and has no keys; +{key}=... would add one")
            break
        if not OmegaConf.is_config(node):
            raise ConfigError(f"{path} is a value and has no keys")
    node = OmegaConf.select(cfg, key)
    targets = [value] if parts[-1] == "_target_" else []
    if isinstance(value, dict):
        targets = [value["_target_"]] if "_target_" in value else []
        # An argument that is a mapping may have any keys.
        owner = OmegaConf.select(cfg, ".".join(parts[:-1])) if len(parts) > 1 else cfg
        is_mapping = is_called(owner) and not is_called(node)
        checked = isinstance(node, DictConfig) and not (added or targets or is_mapping)
        for name in value if checked else ():
            if name not in node and not has_argument(node, name):
                name = f"{key}.{name}"
                raise ConfigError(unknown_key(name, nearest_key(cfg, name)))
    for target in targets:
        try:
            locate(target)
        except Exception as error:
            # Importing a module may raise anything.
            raise ConfigError(f"there is no {show(str(target))}") from error
    OmegaConf.update(cfg, key, value, merge=True)


def cannot_apply(override: str, error: Exception) -> ConfigError:
    if isinstance(error, ConfigError):
        return error
    hint = ". A ${ that refers to no key is written \\${" if "${" in override else ""
    return ConfigError(f"{show(override)} cannot be applied: {first_line(error)}{hint}")


def unknown_key(key: str, nearest: str) -> str:
    hint = f"did you mean {nearest}? " if nearest else ""
    key = show(key)
    return f"the config has no key {key}: {hint}+{key}=... would add it"


def first_missing(cfg: DictConfig, key: str) -> int | None:
    """Return the index of the first part of a key that does not exist; None if all do."""
    node = cfg
    for place, part in enumerate(key.split(".")):
        if isinstance(node, DictConfig):
            if part not in node:
                return None if has_argument(node, part) else place
            node = node[part]
        elif isinstance(node, ListConfig) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        elif node is None:
            return None
        else:
            return place
    return None


def has_argument(node: DictConfig, name: str) -> bool:
    """Return whether what a node of a config calls accepts an argument."""
    if not is_called(node):
        return False
    names, more = arguments_of(node["_target_"])
    return more or name in names


def nearest_key(cfg: DictConfig, key: str) -> str:
    """Return the most similar key of a config; empty if none is similar.

    Keys with the same last part come first, such as ``optimizer.lr`` for ``lr``.
    """
    keys = set(all_keys(OmegaConf.to_container(cfg, resolve=False)))
    same = [other for other in keys if other.rpartition(".")[2] == key.rpartition(".")[2]]
    close = difflib.get_close_matches(key, same, 1, cutoff=0.0)
    return (close or difflib.get_close_matches(key, keys, 1) or [""])[0]


def all_keys(node: object, prefix: str = "") -> Iterator[str]:
    """Yield the keys of a config as a plain container, and the arguments that it does not set."""
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
