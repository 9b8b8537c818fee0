"""A trained detector in one file of the safetensors format: its weights, config and classes.

The format holds tensors and texts, so opening a file runs nothing.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from ..version import __version__
from .files import atomic_open, explained, import_safetensors

# The keys of our texts among those of a file.
PREFIX = "lite_detr."


@dataclass(frozen=True)
class Release:
    """What a file says of its weights; every part is None if it does not say it.

    Attributes:
        config: plain values, see :func:`lite_detr.inference.released.release_config`.
        class_names: the names of the classes by number.
        version: of this package, that wrote the file.
    """

    config: dict[str, Any] | None = None
    class_names: list[str] | None = None
    version: str | None = None


def write_release(
    path: str | os.PathLike,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write a file, whole or not at all.

    Args:
        path: its name, which ends in ``.safetensors``.
        weights: by our names.
        config: plain values.
        class_names: the names of the classes by number, or None.

    Raises:
        WeightsError: the library is not installed.
        SaveError: the file cannot be written.
    """
    library = import_safetensors(os.fspath(path))
    texts = {"version": __version__}
    if config is not None:
        texts["config"] = json.dumps(config)
    if class_names is not None:
        texts["class_names"] = json.dumps(list(class_names))
    # The format refuses tensors that share memory, as shared heads do.
    tensors = {
        name: weight.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, weight in weights.items()
    }
    metadata = {"format": "pt"} | {f"{PREFIX}{key}": text for key, text in texts.items()}
    content = library.torch.save(tensors, metadata)
    with atomic_open(path, "wb") as file:
        file.write(content)


def read_release(path: str) -> Release:
    """Return what a file says of its weights; nothing if another program wrote it.

    Raises:
        WeightsError: the library is not installed, or the file is broken.
    """
    library = import_safetensors(path)
    with explained(path):
        with library.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        texts = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}
        config = json.loads(texts.get("config", "null"))
        names = json.loads(texts.get("class_names", "null"))
        if not isinstance(config, dict | None) or not isinstance(names, list | None):
            raise WeightsError(f"weights {path} are broken: their metadata is of another form")
        if names is not None and not all(isinstance(name, str) for name in names):
            raise WeightsError(f"weights {path} are broken: their class names are not texts")
    return Release(config, names, texts.get("version"))
