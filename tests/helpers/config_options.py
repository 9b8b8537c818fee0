"""Overrides ``key=value`` of lazy configs: besides that their keys are there, do values fit?"""

import copy
import functools
from collections.abc import Sequence

from omegaconf import DictConfig, ListConfig, OmegaConf

from lite_detr import model_zoo
from lite_detr.overrides import apply_overrides


def check_options(config: str, options: Sequence[str]) -> None:
    """Checks that a config exists, that it has all keys, and that the values' kinds fit.

    Raises:
        FileNotFoundError, ConfigError: see :func:`lite_detr.overrides.load_config`.
        ValueError: a value is of another kind than the config's; the message says which.
    """
    cfg = copy.deepcopy(load(config)) if options else load(config)
    for option in options:
        key = option.partition("=")[0]
        before = OmegaConf.select(cfg, key)
        cfg = apply_overrides(cfg, [option])
        if not same_kind(before, OmegaConf.select(cfg, key)):
            raise ValueError(f"{option}: {config} has {before!r} there, which is of another kind")


@functools.cache
def load(config: str) -> DictConfig:
    return model_zoo.get_config(config)


def same_kind(before: object, after: object) -> bool:
    if before is None or after is None:
        return True
    for kinds in ((bool,), (int, float), (str, ListConfig, list, tuple), (DictConfig, dict)):
        if isinstance(before, kinds):
            return isinstance(after, kinds) and isinstance(after, bool) == isinstance(before, bool)
    return True
