"""Detectron2's checkpointer, with a word on weights that do not fit."""

import logging
import re
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

logger = logging.getLogger("lite_detr")

# The only weights whose shapes depend on the number of classes.
CLASS_HEAD = re.compile(r"(^|\.)class_embed\.")


class WeightsError(ValueError):
    """Weights do not fit the model."""


class DetrCheckpointer(DetectionCheckpointer):
    """Loads weights as Detectron2 does, but never skips what does not fit in silence.

    Args:
        model: the detector, or its DDP wrapper.
        save_dir: where checkpoints go.
        allow_new_classes: a checkpoint with another number of classes keeps the model's freshly
            drawn class heads, with a warning, as fine-tuning wants; otherwise it is an error.
        **checkpointables: see :class:`DetectionCheckpointer`.
    """

    def __init__(
        self, model, save_dir: str = "", *, allow_new_classes: bool = False, **checkpointables
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.allow_new_classes = allow_new_classes
        self._path = ""

    def load(self, path: str, *args, **kwargs) -> dict[str, Any]:
        """See :meth:`DetectionCheckpointer.load`.

        Raises:
            FileNotFoundError: there is no such file.
            WeightsError: shapes differ, or the file holds none of the detector's weights.
        """
        if path and "://" not in path and not self.path_manager.isfile(path):
            raise FileNotFoundError(f"weights {path}: there is no such file")
        self._path = path
        return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint: Any):
        has_detector = any("decoder." in name for name in checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        heads = [entry for entry in incompatible.incorrect_shapes if CLASS_HEAD.search(entry[0])]
        others = [entry for entry in incompatible.incorrect_shapes if entry not in heads]
        if others:
            name, given, expected = others[0]
            raise WeightsError(
                f"weights {self._path} do not fit the config: {name} is {tuple(given)} in the file "
                f"and {tuple(expected)} in the model, and {len(others) - 1} more differ. Use the "
                "config that the weights were trained with"
            )
        if heads:
            _, given, expected = heads[0]
            message = (
                f"weights {self._path} are for {given[0]} classes, the model has {expected[0]}"
            )
            if not self.allow_new_classes:
                raise WeightsError(f"{message}: set model.num_classes={given[0]}")
            logger.warning("%s: its class heads start anew", message)
        if has_detector and not heads and incompatible.missing_keys:
            missing = incompatible.missing_keys
            raise WeightsError(
                f"weights {self._path} lack {len(missing)} of the model's, such as {missing[0]}. "
                "Use the config that the weights were trained with"
            )
        return incompatible
