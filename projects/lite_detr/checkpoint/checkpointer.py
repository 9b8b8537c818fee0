"""Detectron2's checkpointer: safe to read from and to be killed in, and clear on what is amiss."""

import logging
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import Tensor

from ..errors import MissingFileError, WeightsError, raised_in_all
from .atomic import AtomicFiles, remove_unfinished
from .convert import as_tensors, convert_weights
from .files import explained, read_pickle, read_safetensors, read_torch
from .heads import CLASS_WEIGHT
from .sources import recognise
from .whole import last_whole

logger = logging.getLogger("lite_detr")


class DetrCheckpointer(DetectionCheckpointer):
    """Loads weights as Detectron2 does, but never skips what does not fit in silence.

    No file that it reads can run code. A file that it writes has its name only when it is whole, so
    that a kill or a full disk leaves the checkpoints before it as they were.

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
        self.path_manager = AtomicFiles(self.path_manager)
        # Whether resume_or_load has found something to resume.
        self.resumed = False

    def save(self, name: str, **kwargs: Any) -> None:
        """See :meth:`DetectionCheckpointer.save`.

        Raises:
            SaveError: the file cannot be written.
        """
        if self.save_dir and self.save_to_disk and "://" not in self.save_dir:
            remove_unfinished(self.save_dir)
        super().save(name, **kwargs)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """See :meth:`DetectionCheckpointer.resume_or_load`.

        Where the last checkpoint is broken, the last one that is whole is taken, with a warning.
        In a job of several processes the first one looks which it is.

        Raises:
            MissingFileError: a process does not see the checkpoint.
            WeightsError: no checkpoint is whole, or the weights do not fit the model.
        """
        self.resumed = comm.all_gather(resume and self.has_checkpoint())[0]
        if not self.resumed:
            return super().resume_or_load(path, resume=False)
        # What is resumed has been trained, and lacks nothing.
        self.fine_tune = False
        return self.load(self._find_last_whole())

    def _find_last_whole(self) -> str:
        latest = self.get_checkpoint_file()
        if "://" in self.save_dir:
            return latest
        found = ""
        with raised_in_all(WeightsError):
            if comm.is_main_process():
                others = [file for file in self.get_all_checkpoint_files() if file != latest]
                found = last_whole(latest, others)
        return comm.all_gather(found)[0]

    def load(self, path: str, *args, **kwargs) -> dict[str, Any]:
        """See :meth:`DetectionCheckpointer.load`.

        Raises:
            MissingFileError: there is no such file.
            WeightsError: the file is no checkpoint, or its weights do not fit the model.
        """
        if path and "://" not in path and not self.path_manager.isfile(path.split("?")[0]):
            raise MissingFileError(f"weights {path}: there is no such file")
        self._path = path
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".safetensors"):
            return {"model": read_safetensors(filename)}
        # Detectron2 would run what files of these two kinds say.
        if filename.endswith(".pkl"):
            return from_zoo(read_pickle(filename), self._path)
        if filename.endswith(".pyth"):
            return from_pycls(read_torch(filename), self._path)
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
        if {name for name, _ in self.model.named_parameters()}.issubset(missing):
            raise WeightsError(
                f"weights {self._path} hold nothing of the model: their names are such as "
                f"{next(iter(weights), 'none')}, the model's such as {missing[0]}. Give weights of "
                'its backbone or of a detector, or train.init_checkpoint="" to start from none'
            )
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


def from_zoo(content: Any, path: str) -> dict[str, Any]:
    """What a pickle of Detectron2's model zoo holds, or one of Caffe2's weights by their names."""
    if not isinstance(content, dict):
        raise WeightsError(f"weights {path} are no checkpoint, but a {type(content).__name__}")
    if "model" in content:
        return content
    weights = content.get("blobs", content)
    weights = {name: value for name, value in weights.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def from_pycls(content: Any, path: str) -> dict[str, Any]:
    """What a checkpoint of pycls holds."""
    if not isinstance(content, dict) or "model_state" not in content:
        raise WeightsError(f"weights {path} are no checkpoint of pycls: they lack model_state")
    weights = content["model_state"].items()
    weights = {name: value for name, value in weights if not name.endswith("num_batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
