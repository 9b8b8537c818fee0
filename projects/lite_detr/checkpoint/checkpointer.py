"""Detectron2's checkpointer: safe to read from and to be killed in, and clear on what is wrong."""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, urlparse

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import Tensor

from ..errors import (
    LiteDetrError,
    MissingFileError,
    SaveError,
    WeightsError,
    downloading,
    raised_in_all,
)
from ..labels import first_line
from . import mmdetection
from .convert import CLASS_WEIGHT, NOT_NEEDED, as_tensors, convert_weights
from .files import (
    AtomicFiles,
    locate_weights,
    read_pickle,
    read_safetensors,
    read_torch,
    remove_unfinished,
)
from .pickles import unreadable_part
from .release_file import read_release
from .sources import recognise

logger = logging.getLogger("lite_detr")

# The file that names the last checkpoint, and the most that is read of it.
TAG = "last_checkpoint"
MAX_TAG = 1000  # characters


class DetrCheckpointer(DetectionCheckpointer):
    """Loads weights as Detectron2 does, but never skips in silence what does not fit.

    No file that it reads can run code. A file that it writes takes its name only when it is
    complete, so that a kill or a full disk leaves the earlier checkpoints as they were.

    Args:
        model: the detector, or its DDP wrapper.
        save_dir: the folder for checkpoints.
        fine_tune: whether training starts from the weights. If so, they may be those of a backbone
            alone, and weights for another number of classes leave the class heads as they were
            initialised, with a warning; otherwise both are errors. None: true if there are
            checkpointables, such as an optimizer, since evaluation has none.
        **checkpointables: see :class:`DetectionCheckpointer`.
    """

    def __init__(
        self, model, save_dir: str = "", *, fine_tune: bool | None = None, **checkpointables
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.fine_tune = bool(self.checkpointables) if fine_tune is None else fine_tune
        self._path = ""
        # The names in the file that the weights lie below.
        self._where = ""
        self.path_manager = AtomicFiles(self.path_manager)
        # Whether resume_or_load has found something to resume.
        self.resumed = False

    def save(self, name: str, **kwargs: Any) -> None:
        """See :meth:`DetectionCheckpointer.save`; also saves the model's ``class_names``.

        Raises:
            SaveError: the file cannot be written, or could not be read again.
        """
        if names := getattr(self.model, "class_names", None):
            kwargs["class_names"] = list(names)
        if self.save_dir and self.save_to_disk:
            states = {key: value.state_dict() for key, value in self.checkpointables.items()}
            for key, state in (states | kwargs).items():
                if part := unreadable_part(state, key):
                    raise SaveError(
                        f"{name}.pth is not written, as it could not be read again: {part}. Give "
                        "numbers, strings, tensors, arrays of numbers, lists, tuples and dicts"
                    )
            if "://" not in self.save_dir:
                remove_unfinished(self.save_dir)
        super().save(name, **kwargs)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """See :meth:`DetectionCheckpointer.resume_or_load`.

        If the last checkpoint is broken, or the file that names it is missing, the latest valid
        one is used, with a warning. In a job of several processes the first one finds it.

        Raises:
            MissingFileError: a process does not see the checkpoint.
            WeightsError: there are checkpoints, but none is valid, or the weights do not fit.
        """
        latest = ""
        if resume:
            with raised_in_all(WeightsError):
                if comm.is_main_process():
                    latest = self._find_latest_valid()
            latest = comm.all_gather(latest)[0]
        self.resumed = bool(latest)
        if not self.resumed:
            return super().resume_or_load(path, resume=False)
        # What is resumed has been trained, and lacks nothing.
        self.fine_tune = False
        return self.load(latest)

    def get_checkpoint_file(self) -> str:
        """Return the checkpoint that the tag names; empty if there is none, or no file's name."""
        is_local = "://" not in self.save_dir
        try:
            if is_local and not os.path.isfile(self._tag_path):
                return ""
            with self.path_manager.open(self._tag_path, "r") as file:
                name = file.read(MAX_TAG + 1).strip()
        except (OSError, UnicodeDecodeError):
            return ""
        is_name = len(name) <= MAX_TAG and name.isprintable() and name not in ("", ".", "..")
        return os.path.join(self.save_dir, name) if is_name and "/" not in name else ""

    def _find_latest_valid(self) -> str:
        if "://" in self.save_dir:
            return self.get_checkpoint_file() if self.has_checkpoint() else ""
        if not os.path.isdir(self.save_dir):
            return ""
        return latest_valid(
            self.get_checkpoint_file(), self.get_all_checkpoint_files(), self._tag_path
        )

    @property
    def _tag_path(self) -> str:
        return os.path.join(self.save_dir, TAG)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """See :meth:`DetectionCheckpointer.load`.

        Raises:
            DownloadError: the file cannot be downloaded.
            MissingFileError: there is no such file.
            WeightsError: the file is not a checkpoint, or does not fit what it is loaded into.
        """
        if not path:
            backbone = getattr(self.model, "backbone", None)
            source = getattr(backbone, "weights_source", "")
            logger.info(
                "No train.init_checkpoint: %s",
                f"the backbone has {source}, the rest random ones"
                if source
                else "all weights are random",
            )
            return {}
        self._path, self._where = path, ""
        if "://" in path:
            with downloading(f"weights {path}", "train.init_checkpoint=FILE"):
                address = urlparse(path)._replace(query="").geturl()
                local = self.path_manager.get_local_path(address)
            if not os.path.isfile(local):
                raise MissingFileError(f"weights {path}: there is no such file")
        elif not self.path_manager.isfile(path.split("?")[0]):
            kind = "it is not a file" if os.path.exists(path) else "there is no such file"
            raise MissingFileError(f"weights {path}: {kind}")
        try:
            rest = super().load(path, checkpointables=[])
        finally:
            # Detectron2 resets it only if nothing is raised, and else refuses to load again.
            self._parsed_url_during_load = None
        self._take_class_names(rest.pop("class_names", None))
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in rest:
                self._load_checkpointable(key, rest.pop(key))
        return rest

    def _take_class_names(self, names: Any) -> None:
        """Give the model the names of the classes in a checkpoint, unless it has its own."""
        # Fine-tuning may be for other classes; what is not a list of texts is another program's.
        if self.fine_tune or not isinstance(names, list):
            return
        if not all(isinstance(name, str) for name in names):
            return
        expected = getattr(self.model, "num_classes", len(names))
        own = getattr(self.model, "class_names", None)
        if len(names) != expected:
            logger.warning(
                "weights %s name %d classes and the model has %d: the names are not used",
                self._path,
                len(names),
                expected,
            )
        elif own is None:
            self.model.class_names = tuple(names)
        elif list(own) != names:
            number = next(i for i, (one, other) in enumerate(zip(own, names)) if one != other)
            logger.warning(
                "weights %s were trained for other classes, or another order of them: class %d is "
                "%r in them and %r in the dataset given",
                self._path,
                number,
                names[number],
                own[number],
            )

    def _load_checkpointable(self, key: str, state: Any) -> None:
        try:
            self.checkpointables[key].load_state_dict(state)
        except LiteDetrError:
            raise
        # Each has errors of its own for a state that is another's, or a hostile file's.
        except Exception as error:
            raise WeightsError(
                f"weights {self._path} hold a state of {key} that does not fit: {first_line(error)}"
            ) from error

    # The methods below are those that Detectron2's checkpointers override in each other; there are
    # no public ones.

    def _load_file(self, filename: str) -> dict[str, Any]:
        """Return ``{"model": weights, ...}`` in place of Detectron2, which would run files."""
        if filename.endswith(".safetensors"):
            names = read_release(filename).class_names
            return {"model": read_safetensors(filename), "class_names": names}
        if filename.endswith(".pkl"):
            return from_zoo(read_pickle(filename), self._path)
        content = read_torch(filename)
        if filename.endswith(".pyth"):
            return from_pycls(content, self._path)
        weights, self._where = locate_weights(content, self._path)
        result = {"model": weights} if weights is content else {**content, "model": weights}
        query = parse_qs(urlparse(self._path).query)
        if query.get("matching_heuristics") == ["True"]:
            result["matching_heuristics"] = True
        if names := mmdetection.class_names(content):
            result["class_names"] = names
        return result

    @property
    def _source(self) -> str:
        """The file, and the names in it that the weights lie below, unless it is Detectron2's."""
        return self._path if self._where in ("", "model") else f"{self._path} (in {self._where})"

    def _load_model(self, checkpoint: dict[str, Any]):
        path = self._source
        weights = checkpoint["model"] = as_tensors(checkpoint["model"], f"weights {path}")
        if not weights:
            raise WeightsError(f"weights {path} are an empty dict")
        source = recognise(weights)
        refused = source is not None and source.refusal
        has_detector = any("decoder." in name for name in weights)
        if not (has_detector or refused or self.fine_tune):
            raise WeightsError(
                f"weights {path} hold no detector: the weights of a backbone alone can only start "
                "a training run"
            )
        if source is not None:
            checkpoint |= {"model": self._convert(weights), "matching_heuristics": False}
        given = set(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        heads = [entry for entry in incompatible.incorrect_shapes if CLASS_WEIGHT.match(entry[0])]
        others = [entry for entry in incompatible.incorrect_shapes if entry not in heads]
        if others:
            name, theirs, ours = others[0]
            raise WeightsError(
                f"weights {path} do not fit the config: {name} is {tuple(theirs)} in the file and "
                f"{tuple(ours)} in the model, and {len(others) - 1} more differ. Use the config "
                "that the weights were trained with"
            )
        if heads:
            _, theirs, ours = heads[0]
            self._renew_heads(theirs[0], ours[0])
        renewed = {entry[0] for entry in heads}
        missing = [name for name in incompatible.missing_keys if name not in renewed]
        if {name for name, _ in self.model.named_parameters()}.issubset(missing):
            raise WeightsError(
                f"weights {path} hold nothing of the model: their names are such as "
                f"{next(iter(weights), 'none')}, the model's such as {missing[0]}. Give weights of "
                'its backbone or of a detector, or train.init_checkpoint="" to start from none'
            )
        if has_detector:
            # Some modules of Detectron2 fill in for themselves what the weights lack.
            missing += [n for n in self._statistics() if n not in given and n not in missing]
            self._check_complete(missing, incompatible.unexpected_keys)
        return incompatible

    def _statistics(self) -> list[str]:
        """Return the names of the running means and variances of the model's norms."""
        names = self.model.state_dict()
        return [name for name in names if name.endswith((".running_mean", ".running_var"))]

    def _check_complete(self, missing: list[str], unexpected: list[str]) -> None:
        hint = "Use the config that the weights were trained with"
        if missing:
            raise WeightsError(
                f"weights {self._source} lack {len(missing)} of the model's, such as {missing[0]}. "
                f"{hint}"
            )
        left = [
            name
            for name in unexpected
            if not any(re.fullmatch(pattern, name) for pattern, _ in NOT_NEEDED)
        ]
        if left:
            raise WeightsError(
                f"weights {self._source} do not fit the config: the model has no place for "
                f"{len(left)} of them, such as {left[0]}. {hint}"
            )

    def _convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert another implementation's weights to our names."""
        try:
            conversion = convert_weights(weights, self.model)
        except WeightsError as error:
            raise WeightsError(f"{self._source}: {error}") from error
        logger.info("%s", conversion.summary())
        if conversion.renewed:
            self._renew_heads(conversion.num_classes, self.model.num_classes)
        return conversion.state_dict

    def _renew_heads(self, given: int, expected: int) -> None:
        """Warn that class heads are re-initialised, or refuse if nothing is trained afterwards."""
        message = f"weights {self._source} are for {given} classes, the model has {expected}"
        if not self.fine_tune:
            raise WeightsError(f"{message}: set model.num_classes={given}")
        logger.warning("%s: its class heads are re-initialised", message)


def latest_valid(latest: str, files: list[str], tag: str) -> str:
    """Return the checkpoint to resume from; a warning names those that are broken.

    Args:
        latest: the file that the tag names; empty if it names none.
        files: all files of the folder that may be checkpoints.
        tag: the file that should name the last one.

    Returns:
        A path; empty if there are no checkpoints at all, and the tag does not speak of any.

    Raises:
        WeightsError: there are checkpoints, or a tag, but none is valid.
    """
    problems = []
    if latest:
        if is_valid(latest, problems):
            return latest
    elif os.path.lexists(tag):
        problems.append(f"{tag} does not hold the name of a file")
    found = {}
    for path in files:
        if path != latest and (content := read_valid(path, problems)) is not None:
            found[path] = content["iteration"]
    if latest or os.path.lexists(tag):
        # A folder may hold checkpoints of an older run, which came further.
        order = sorted(found, key=os.path.getmtime, reverse=True)
    else:
        # Files without a tag were copied, and their times say when.
        order = sorted(found, key=lambda path: (found[path], os.path.getmtime(path)), reverse=True)
        if order:
            problems.append(f"there is no {tag}")
    for path in order:
        if is_valid(path, problems):
            logger.warning("%s. Going on from %s instead", "; ".join(problems), path)
            return path
    if not problems:
        return ""
    raise WeightsError(
        f"there is nothing to resume from: {'; '.join(problems)}. To start from the beginning, "
        "leave out --resume, or set another train.output_dir"
    )


def is_valid(path: str, problems: list[str]) -> bool:
    """Tell whether a file is a complete training checkpoint; if not, ``problems`` says why."""
    if not os.path.isfile(path):
        problems.append(f"weights {path}: there is no such file")
        return False
    known = len(problems)
    content = read_valid(path, problems, meta=False)
    if content is None and len(problems) == known:
        problems.append(f"weights {path} are not of a training run")
    return content is not None


def read_valid(path: str, problems: list[str], *, meta: bool = True) -> Mapping[str, Any] | None:
    """Return a training checkpoint; None for other files, and for broken ones with the reason."""
    try:
        content = read_torch(path, meta=meta)
    except WeightsError as error:
        problems.append(str(error))
        return None
    is_training = isinstance(content, Mapping) and type(content.get("iteration")) is int
    return content if is_training and isinstance(content.get("model"), Mapping) else None


def from_zoo(content: Any, path: str) -> dict[str, Any]:
    """Return a checkpoint from a pickle of Detectron2's model zoo, or of Caffe2's weights."""
    if not isinstance(content, dict):
        raise WeightsError(
            f"weights {path} are not a checkpoint, but a value of type {type(content).__name__}"
        )
    if "model" in content:
        return content
    weights = content.get("blobs", content)
    if not isinstance(weights, dict):
        raise WeightsError(f"weights {path} are not a checkpoint: their blobs are not a dict")
    weights = {name: value for name, value in weights.items() if not is_momentum(name)}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def is_momentum(name: Any) -> bool:
    return isinstance(name, str) and name.endswith("_momentum")


def from_pycls(content: Any, path: str) -> dict[str, Any]:
    """Return a checkpoint from one of pycls."""
    weights = content.get("model_state") if isinstance(content, dict) else None
    if not isinstance(weights, Mapping):
        raise WeightsError(f"weights {path} are not a checkpoint of pycls: they lack model_state")
    weights = {n: value for n, value in weights.items() if not str(n).endswith("batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
