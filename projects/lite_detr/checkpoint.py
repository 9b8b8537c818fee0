"""Detectron2's checkpointer, with a word on weights that do not fit."""

import logging
import pickle
import re
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

logger = logging.getLogger("lite_detr")

# The only weights whose shapes depend on the number of classes.
CLASS_HEAD = re.compile(r"(^|\.)class_embed\.")


class WeightsError(ValueError):
    """Weights cannot be read or do not fit the model."""


class DetrCheckpointer(DetectionCheckpointer):
    """Loads weights as Detectron2 does, but never skips what does not fit in silence.

    Args:
        model: the detector, or its DDP wrapper.
        save_dir: where checkpoints go.
        fine_tune: the weights are what a training starts from. So they may be a backbone's alone,
            and those of another number of classes leave the class heads as they were drawn, with a
            warning; otherwise both are errors.
        **checkpointables: see :class:`DetectionCheckpointer`.
    """

    def __init__(self, model, save_dir: str = "", *, fine_tune: bool = False, **checkpointables):
        super().__init__(model, save_dir, **checkpointables)
        self.fine_tune = fine_tune
        self._path = ""

    def load(self, path: str, *args, **kwargs) -> dict[str, Any]:
        """See :meth:`DetectionCheckpointer.load`.

        Raises:
            FileNotFoundError: there is no such file.
            WeightsError: the file is no checkpoint, or its weights do not fit the model.
        """
        if path and "://" not in path and not self.path_manager.isfile(path.split("?")[0]):
            raise FileNotFoundError(f"weights {path}: there is no such file")
        self._path = path
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            return super()._load_file(filename)
        except (EOFError, KeyError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise WeightsError(f"weights {self._path} are no checkpoint: {reason}") from error

    def _load_model(self, checkpoint: Any):
        has_detector = any("decoder." in name for name in checkpoint["model"])
        if not has_detector and not self.fine_tune:
            raise WeightsError(
                f"weights {self._path} hold no detector: a backbone's weights alone are only for "
                "starting a training"
            )
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
            if not self.fine_tune:
                raise WeightsError(f"{message}: set model.num_classes={given[0]}")
            logger.warning("%s: its class heads start anew", message)
        renewed = {entry[0] for entry in heads}
        missing = [name for name in incompatible.missing_keys if name not in renewed]
        if has_detector and missing:
            raise WeightsError(
                f"weights {self._path} lack {len(missing)} of the model's, such as {missing[0]}. "
                "Use the config that the weights were trained with"
            )
        return incompatible
