"""The config in a released detector's file: written as plain values, and read as untrusted ones.

A lazy config names what it calls, and so is a program. Here it may only build parts of detectors
and resize images, and reads no other file.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.data.transforms import Augmentation
from detectron2.layers import ShapeSpec
from detectron2.modeling import ResNet

# The first is private: what LazyConfig.save names classes by, so that `locate` finds them.
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..baselines import dilated_stages
from ..checkpoint.files import find_weights, read_torch
from ..checkpoint.release_file import read_release, write_release
from ..data.mapper import DetectionMapper
from ..errors import ConfigError, WeightsError
from ..labels import first_line

# Where the classes that a config may build are defined, and what they must be.
PACKAGES = (
    "detectron2.data.transforms",
    "detectron2.modeling",
    "lite_detr.baselines",
    "lite_detr.modeling",
    "torch.nn",
)
KINDS = (nn.Module, Augmentation)
# Others that a config may call.
CALLABLES = (DetectionMapper, ShapeSpec, ResNet.make_default_stages, dilated_stages)
# The keys of what is called, when the model is built or later.
CALLS = ("_target_", "_partial_")
# The weights that a backbone starts from, which those in the file replace.
INITIAL_WEIGHTS = ("pretrained", "weights", "state_dict")
# Options of timm's models that would read other files.
READING_OPTIONS = ("cache_dir", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")


def release_config(cfg: DictConfig) -> dict[str, Any]:
    """Return what inference needs of a lazy config: its model and the mapper of its test set.

    Names of classes take the place of these, values are resolved, and the weights that a backbone
    starts from are left out.

    Raises:
        ConfigError: a value is neither plain nor a class; the message has its key.
    """
    mapper = OmegaConf.to_container(cfg.dataloader.test.mapper, resolve=True)
    return {
        "model": to_plain(OmegaConf.to_container(cfg.model, resolve=True), "model"),
        "mapper": to_plain(mapper, "dataloader.test.mapper"),
    }


def to_plain(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        kept = without_initial_weights(value)
        return {
            name: target_name(part) if name == "_target_" else to_plain(part, f"{key}.{name}")
            for name, part in kept.items()
        }
    if isinstance(value, list | tuple):
        return [to_plain(part, f"{key}.{index}") for index, part in enumerate(value)]
    if isinstance(value, type):
        return {"_class_": target_name(value)}
    if isinstance(value, functools.partial) and not value.args:
        return {"_partial_": target_name(value.func)} | to_plain(value.keywords, key)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise ConfigError(
        f"{key}={first_line(value)} cannot be written into a safetensors file: give a number, a "
        "text, a list, a class or LazyCall"
    )


def target_name(target: Any) -> str:
    return target if isinstance(target, str) else _convert_target_to_string(target)


def without_initial_weights(value: Mapping[str, Any]) -> dict[str, Any]:
    is_call = any(name in value for name in CALLS)
    return {k: v for k, v in value.items() if not (is_call and k in INITIAL_WEIGHTS)}


def from_plain(value: Any, path: str) -> Any:
    """Return the values of :func:`to_plain` as a lazy config has them.

    Raises:
        WeightsError: the config calls, reads or refers to what it may not.
    """
    if isinstance(value, list):
        return [from_plain(part, path) for part in value]
    if isinstance(value, str) and "${" in value:
        raise WeightsError(f"weights {path}: their config is refused, as it refers to {value!r}")
    if not isinstance(value, dict):
        return value
    if "_class_" in value:
        return find_callable(value["_class_"], path)
    model_name = str(value.get("model_name", ""))
    options = value.get("options") or {}
    reading = [name for name in READING_OPTIONS if name in options]
    if ":" in model_name or reading:
        raise WeightsError(
            f"weights {path}: their config is refused, as it reads other files by "
            f"{', '.join(reading) or f'model_name={model_name}'}"
        )
    found = {
        name: find_callable(part, path) if name in CALLS else from_plain(part, path)
        for name, part in without_initial_weights(value).items()
    }
    if "_partial_" in found:
        return functools.partial(found.pop("_partial_"), **found)
    return found


def find_callable(name: Any, path: str) -> Any:
    """Return what a config may call by name.

    Raises:
        WeightsError: it is not a part of a detector; what it is has not been called.
    """
    packages = (*PACKAGES, "lite_detr.data.mapper", "detectron2.layers")
    # Looking for a name imports modules, so only known ones.
    if isinstance(name, str) and name.startswith(tuple(f"{package}." for package in packages)):
        try:
            found = locate(name)
        # Of names that no version of these packages has.
        except Exception:
            found = None
        is_part = isinstance(found, type) and issubclass(found, KINDS)
        if is_part and f"{found.__module__}.".startswith(tuple(f"{p}." for p in PACKAGES)):
            return found
        if any(found is accepted for accepted in CALLABLES):
            return found
    raise WeightsError(
        f"weights {path}: their config is refused, as it calls {first_line(repr(name), 100)}. "
        "Accepted are parts of detectors of lite_detr, Detectron2 and torch.nn; with a config of "
        "your own, give the file as weights: --config-file CONFIG --weights FILE"
    )


def released_config(path: str, device: str | None = None) -> DictConfig:
    """Return the lazy config in a released file, for :class:`TrainedDetector`.

    Args:
        path: a local file.
        device: None takes a GPU if there is one.

    Raises:
        WeightsError: the file is broken, has no config, or one that is refused.
    """
    release = read_release(path)
    if release.config is None:
        raise WeightsError(
            f"weights {path} hold no config: write them by train_net.py with "
            "train.safetensors=True, or by tools/convert_checkpoint.py"
        )
    parts = {name: release.config.get(name) for name in ("model", "mapper")}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise WeightsError(f"weights {path} are broken: their config has no {name}")
        parts[name] = from_plain(part, path)
    dataset = {"names": []}
    return OmegaConf.create(
        {
            "model": parts["model"],
            "dataloader": {"test": {"mapper": parts["mapper"], "dataset": dataset}},
            "train": {
                "device": device or ("cuda" if torch.cuda.is_available() else "cpu"),
                "init_checkpoint": path,
            },
        },
        flags={"allow_objects": True},
    )


def release_run(cfg: DictConfig) -> list[Path]:
    """Write the final weights of a run, and the averaged and the best, as safetensors files.

    Args:
        cfg: the run's lazy config, whose ``train.output_dir`` has the checkpoints.

    Returns:
        The files, beside the checkpoints.

    Raises:
        ConfigError: a value of the config cannot be written.
        SaveError: a file cannot be written.
    """
    config, written = release_config(cfg), []
    for name in ("model_final", "model_final_ema", "model_best"):
        checkpoint = Path(cfg.train.output_dir, f"{name}.pth")
        if checkpoint.is_file():
            content = read_torch(str(checkpoint))
            weights = find_weights(content, str(checkpoint))
            written.append(checkpoint.with_suffix(".safetensors"))
            write_release(written[-1], weights, config, content.get("class_names"))
    return written
