"""The options of a training run: checked before it begins, and compared when it goes on."""

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError, SaveError, raised_in_all

logger = logging.getLogger("lite_detr")

# The whole numbers of ``train``, with the least value of each.
WHOLE_NUMBERS = {
    "max_iter": 1,
    "eval_period": 0,
    "log_period": 1,
    "accumulation": 1,
    "max_bad_batches": 0,
    "checkpointer.period": 1,
    "checkpointer.max_to_keep": 1,
    "pictures.num_images": 0,
    "early_stopping.patience": 0,
}
# The parts of a config that decide on the course of a run, without what they hold that does not.
DECISIVE = re.compile(r"(model|optimizer|lr_multiplier|dataloader\.train|train)\.")
INDIFFERENT = re.compile(
    r".*\.num_workers|train\.(output_dir|init_checkpoint|device|log_period|eval_period"
    r"|safetensors|(checkpointer|pictures|ddp|best|early_stopping|trackers)\..+)"
)
MAX_LISTED = 10
# What a run saves, from which it goes on or its weights are used, and its records.
CHECKPOINTS = re.compile(r"last_checkpoint|model_(\d{7}|last|best|final(_ema)?)\.pth")
RECORDS = re.compile(r"metrics\.json|events\.out\.tfevents\..+")


def check_options(train: DictConfig) -> None:
    """Refuse options of ``train`` that would end the run later, and a folder it cannot write to.

    Raises:
        ConfigError: an option is out of its range.
        SaveError: nothing can be written to ``output_dir``.
    """
    for name, least in WHOLE_NUMBERS.items():
        value = OmegaConf.select(train, name)
        if value is not None and (type(value) is not int or value < least):
            raise ConfigError(f"train.{name}={value}: accepted are whole numbers from {least} on")
    folder = str(train.output_dir)
    if "://" in folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SaveError(
            f"train.output_dir={folder!r}: {reason}. Give a folder that can be written to"
        ) from error


def check_folder(folder: str, resume: bool) -> bool:
    """Refuse to start a run in a folder that holds one; return whether to go on from there.

    A job that torchrun has started again, after a run that had no checkpoint yet, goes on from the
    beginning, as ``--resume`` does. All processes must call this before they write anything.

    Args:
        folder: the folder of the main process, whose answer holds for all.
        resume: whether ``--resume`` was given.

    Raises:
        ConfigError: the folder holds another run; raised in all processes.
    """
    with raised_in_all(ConfigError):
        if not resume and comm.is_main_process():
            resume = _is_restart(folder)
    return comm.all_gather(resume)[0]


def _is_restart(folder: str) -> bool:
    checkpoints, records = files_of_run(folder)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if restarted and not checkpoints:
        return True
    if found := checkpoints + records:
        more = f" and {len(found) - 2} more" if len(found) > 2 else ""
        raise ConfigError(
            f"train.output_dir={folder} holds a run already ({', '.join(found[:2])}{more}): "
            "continue it with --resume, or give a new run another train.output_dir"
        )
    return False


def files_of_run(folder: str) -> tuple[list[str], list[str]]:
    """Return the names of a run's checkpoints and of its records, without empty records."""
    if "://" in folder:
        tag = f"{folder.rstrip('/')}/last_checkpoint"
        return (["last_checkpoint"] if PathManager.exists(tag) else []), []
    if not os.path.isdir(folder):
        return [], []
    names = sorted(entry.name for entry in os.scandir(folder) if entry.stat().st_size)
    return list(filter(CHECKPOINTS.fullmatch, names)), list(filter(RECORDS.fullmatch, names))


class RunOptions:
    """The options that decide on the course of a run, as a checkpointable.

    Args:
        cfg: the config, before a model is put into it.
    """

    def __init__(self, cfg: DictConfig):
        values = flatten(OmegaConf.to_container(cfg, resolve=False))
        self.values = {
            name: value
            for name, value in values
            if DECISIVE.match(name) and not INDIFFERENT.fullmatch(name)
        }

    def state_dict(self) -> dict[str, str]:
        return self.values

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Compare with a checkpoint's options; a warning names those that differ."""
        names = [name for name in state | self.values if state.get(name) != self.values.get(name)]
        if not names:
            return
        listed = [
            f"{name}={self.values.get(name, 'not set')} (was {state.get(name, 'not set')})"
            for name in names[:MAX_LISTED]
        ]
        logger.warning(
            "%d options differ from the checkpoint's: %s%s. The optimizer's state, its options "
            "included, and the random seed stay those of the checkpoint",
            len(names),
            ", ".join(listed),
            ", ..." if len(names) > MAX_LISTED else "",
        )


def flatten(node: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the keys and values of nested containers, as ``("train.amp.enabled", "True")``."""
    if isinstance(node, Mapping):
        children = node.items()
    elif isinstance(node, (list, tuple)):
        children = enumerate(node)
    else:
        is_plain = isinstance(node, (str, int, float, type(None)))
        owner = node if hasattr(node, "__qualname__") else type(node)
        yield name, str(node) if is_plain else f"{owner.__module__}.{owner.__qualname__}"
        return
    for key, child in children:
        yield from flatten(child, f"{name}.{key}" if name else str(key))


def check_resumed(rest: Mapping[str, Any], iteration: int, train: DictConfig) -> None:
    """Refuse to go on from a checkpoint where options would lose what is in it.

    Args:
        rest: what nothing has loaded of the checkpoint.
        iteration: the iteration that was saved.
        train: the options.

    Raises:
        ConfigError: the run has come further than ``max_iter``, or its average would be dropped.
    """
    if iteration >= train.max_iter:
        raise ConfigError(
            f"train.max_iter={train.max_iter}: the checkpoint in {train.output_dir} has "
            f"{iteration + 1} iterations already. Give at least as many, or another "
            "train.output_dir"
        )
    if "ema" in rest:
        raise ConfigError(
            "train.ema.enabled=False: the checkpoint has a moving average of the weights, which "
            "would be lost. Set train.ema.enabled=True, or start a new run from its weights: "
            "train.init_checkpoint=FILE and another train.output_dir, without --resume"
        )
