"""Overrides ``key=value`` of lazy configs: do they change what is there?

Detectron2 takes any key, and adds it where it is not there, so that a slip of the pen changes
nothing and is not told.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence

from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from lite_detr import model_zoo


def check_options(config: str, options: Sequence[str]) -> None:
    """Checks that a config exists, that it has all keys, and that the values' kinds fit.

    Raises:
        FileNotFoundError, ConfigError: see :func:`lite_detr.model_zoo.get_config`.
        ValueError: an option does not fit; the message says which.
    """
    cfg = copy.deepcopy(load(config)) if options else load(config)
    for option in options:
        key, is_setting, _ = option.partition("=")
        if not is_setting:
            raise ValueError(f"{option} is no key=value, as all that follows one has to be")
        before = value_of(cfg, key)
        cfg = LazyConfig.apply_overrides(cfg, [option])
        after = OmegaConf.select(cfg, key)
        if key.endswith("_target_"):
            try:
                locate(after)
            except ImportError as error:
                raise ValueError(f"{option}: there is no {after}") from error
        elif not same_kind(before, after):
            raise ValueError(f"{option}: {config} has {before!r} there, which is of another kind")


@functools.cache
def load(config: str) -> DictConfig:
    return model_zoo.get_config(config)


def value_of(cfg: DictConfig, key: str) -> object:
    """What a config has at a key; the default where what it calls takes such an argument.

    Raises:
        ValueError: it has no such key.
    """
    path, _, leaf = key.rpartition(".")
    node = OmegaConf.select(cfg, path) if path else cfg
    if isinstance(node, ListConfig) and leaf.isdecimal() and int(leaf) < len(node):
        return node[int(leaf)]
    if isinstance(node, DictConfig):
        if leaf in node:
            return node[leaf]
        parameters = parameters_of(node.get("_target_"))
        if leaf in parameters:
            default = parameters[leaf].default
            return None if default is inspect.Parameter.empty else default
    raise ValueError(f"the config has no key {key}")


def parameters_of(target: str | Callable | None) -> dict[str, inspect.Parameter]:
    """Those by which a config may call its target, which Detectron2 may read from a config."""
    if target is None:
        return {}
    function = locate(target) if isinstance(target, str) else target
    if inspect.isclass(function):
        function = function.__init__
    return dict(inspect.signature(inspect.unwrap(function)).parameters)


def same_kind(before: object, after: object) -> bool:
    if before is None or after is None:
        return True
    for kinds in ((bool,), (int, float), (str, ListConfig, list, tuple), (DictConfig, dict)):
        if isinstance(before, kinds):
            return isinstance(after, kinds) and isinstance(after, bool) == isinstance(before, bool)
    return True
