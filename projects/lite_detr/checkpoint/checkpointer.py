"""Detectron2's checkpointer, with a word on weights that do not fit."""

import logging
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor

from .convert import as_tensors, convert_weights
from .errors import WeightsError
from .files import explained, read_pickle, read_safetensors, read_torch
from .heads import CLASS_WEIGHT
from .sources import recognise

logger = logging.getLogger("lite_detr")


class DetrCheckpointer(DetectionCheckpointer):
    """Loads weights as Detectron2 does, but never skips what does not fit in silence.

    Args:
        model: the detector, or its DDP wrapper.
        save_dir: where checkpoints go.
        fine_tune: the weights are what a training starts from. So they may be a backbone's alone,
            and those of another number of classes leave the class heads as they were drawn, with a
            warning; otherwise both are errors. None: it is so if there are checkpointables, such
            as an optimizer, since evaluation has none.
        **checkpointables: see :class:`DetectionCheckpointer`.
    """

    def __init__(
        self, model, save_dir: str = "", *, fine_tune: bool | None = None, **checkpointables
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.fine_tune = bool(self.checkpointables) if fine_tune is None else fine_tune
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
        if filename.endswith(".safetensors"):
            return {"model": read_safetensors(filename)}
        if filename.endswith(".pkl"):
            # Detectron2 would run what the file says.
            read_pickle(filename)
        with explained(self._path):
            return super()._load_file(filename)

    def _torch_load(self, f: str) -> Any:
        return read_torch(f)

    def _load_model(self, checkpoint: dict[str, Any]):
        weights = as_tensors(checkpoint["model"])
        has_detector = any("decoder." in name for name in weights)
        if not has_detector and not self.fine_tune:
            raise WeightsError(
                f"weights {self._path} hold no detector: a backbone's weights alone are only for "
                "starting a training"
            )
        if recognise(weights) is not None:
            checkpoint |= {"model": self._convert(weights), "matching_heuristics": False}
        incompatible = super()._load_model(checkpoint)
        heads = [entry for entry in incompatible.incorrect_shapes if CLASS_WEIGHT.match(entry[0])]
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
            self._renew_heads(given[0], expected[0])
        renewed = {entry[0] for entry in heads}
        missing = [name for name in incompatible.missing_keys if name not in renewed]
        if has_detector and missing:
            raise WeightsError(
                f"weights {self._path} lack {len(missing)} of the model's, such as {missing[0]}. "
                "Use the config that the weights were trained with"
            )
        return incompatible

    def _convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Another implementation's weights by our names, see :func:`convert`."""
        try:
            conversion = convert_weights(weights, self.model)
        except WeightsError as error:
            raise WeightsError(f"{self._path}: {error}") from error
        logger.info("%s", conversion.summary())
        if conversion.renewed:
            self._renew_heads(conversion.num_classes, self.model.num_classes)
        return conversion.state_dict

    def _renew_heads(self, given: int, expected: int) -> None:
        """Says that class heads start anew, or refuses where nothing is trained afterwards."""
        message = f"weights {self._path} are for {given} classes, the model has {expected}"
        if not self.fine_tune:
            raise WeightsError(f"{message}: set model.num_classes={given}")
        logger.warning("%s: its class heads start anew", message)
