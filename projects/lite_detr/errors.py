"""The errors that a user can mend, and how several processes raise one together.

Programs catch :class:`LiteDetrError` once, in :mod:`lite_detr.cli`, and end with one line instead
of a traceback. So each message says what was given, what is accepted, and what to do.
"""

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

# Modules whose errors say that something cannot be downloaded.
NETWORK_MODULES = set(
    "http httpcore httpcore2 httpx httpx2 huggingface_hub requests socket ssl urllib "
    "urllib3".split()
)
# What PyTorch's loader says if one of its processes is killed; the error has no class of its own.
DEAD_WORKER = re.compile(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)")
# The system's error numbers for a full disk, an exhausted quota and a file size limit.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LiteDetrError(Exception):
    """Base of all errors that a user can mend."""


class MissingFileError(LiteDetrError, FileNotFoundError):
    """A file named by the user does not exist."""


class ConfigError(LiteDetrError, ValueError):
    """A config is of the wrong kind, or an override does not fit it."""


class MissingPackageError(LiteDetrError, ModuleNotFoundError):
    """A package is not installed; the message has the command that installs it."""


class DatasetError(LiteDetrError, ValueError):
    """A dataset cannot be used; the message names the file and what to change in it."""


class ImageError(LiteDetrError, ValueError):
    """An image that neither training nor evaluation can use.

    Args:
        kind: one of the kinds in ``lite_detr.data.image_files``.
        reason: what is wrong with this file, in a phrase.
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


class VideoError(LiteDetrError, OSError):
    """A video or a camera cannot be read, or no window can show it."""


class WeightsError(LiteDetrError, ValueError):
    """Weights cannot be read or do not fit the model."""


class SaveError(LiteDetrError, OSError):
    """A checkpoint cannot be written."""


class DownloadError(LiteDetrError, OSError):
    """Weights are not on this machine and cannot be downloaded."""


class LaunchError(LiteDetrError, ValueError):
    """The processes of a job, its options and its GPUs do not fit together."""


class DivergenceError(LiteDetrError, FloatingPointError):
    """A loss or a gradient is NaN or infinite; no weight has been changed by it.

    Args:
        what: the quantity that is not finite.
        iteration: the trainer's iteration.
        losses: ``{name: loss}`` of one process in which it happened.
        files: names of the batch's images, from every process in which it happened.

    Attributes:
        checkpoint: the latest checkpoint, to continue from; empty if there is none.
    """

    def __init__(
        self, what: str, iteration: int, losses: Mapping[str, float], files: Sequence[str]
    ):
        super().__init__(what, iteration, losses, files)
        self.what = what
        self.iteration = iteration
        self.losses = dict(losses)
        self.files = list(files)
        self.checkpoint = ""

    def summary(self) -> str:
        """Return what happened and where, in three lines."""
        losses = ", ".join(f"{name} {loss:.4g}" for name, loss in self.losses.items())
        return (
            f"{self.what} at iteration {self.iteration}\n"
            f"  losses: {losses}\n"
            f"  images: {', '.join(self.files)}"
        )

    def __str__(self) -> str:
        return (
            f"{self.summary()}\n"
            f"  last checkpoint: {self.checkpoint or 'none'}\n"
            "Look at the images first; train.max_bad_batches=1 skips one such batch. If the losses "
            "rose before, lower optimizer.lr or optimizer.clip_norm. See docs/training.md"
        )


class OptimizationError(LiteDetrError, RuntimeError):
    """A detector cannot be optimized for inference as requested."""


class ExportError(LiteDetrError, RuntimeError):
    """A format cannot hold the detector, or a package or compiler is missing."""


class UnknownPartError(LiteDetrError, LookupError):
    """A model has no such attention, layer or scale; the message names those that it has."""


class LevelsError(LiteDetrError, ValueError):
    """Levels, tokens and padding do not fit each other, or the module that they are given to."""


class QueryError(LiteDetrError, ValueError):
    """An image has no such query, or no detection to take one from."""


def user_message(error: BaseException | None) -> str:
    """Return the line that a program prints for an error; empty if only we can mend it."""
    if isinstance(error, LiteDetrError):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"{error}: make room in train.output_dir, and continue with --resume"
    if isinstance(error, RuntimeError) and DEAD_WORKER.match(str(error)):
        return (
            f"a process that reads data has died, often for want of memory ({error}): give fewer "
            "num_workers to the dataloader; --resume continues a training run"
        )
    return ""


@contextmanager
def downloading(what: str, instead: str) -> Iterator[None]:
    """Turn the network's errors, of whatever library, into a :class:`DownloadError`.

    Args:
        what: what is downloaded, such as ``weights https://...``.
        instead: the option that names a file instead, such as ``train.init_checkpoint=FILE``.
    """
    try:
        yield
    except Exception as error:
        # The libraries that download share no base class; they are known by their modules.
        if isinstance(error, LiteDetrError) or not any(map(is_network_error, causes(error))):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise DownloadError(
            f"{what} cannot be downloaded: {reason}. Get the file where there is a network, and "
            f"give it: {instead}"
        ) from error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors behind it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_network_error(error: BaseException) -> bool:
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, (ConnectionError, TimeoutError)) or module in NETWORK_MODULES


@contextmanager
def raised_in_all(*kinds: type[Exception]) -> Iterator[None]:
    """Raise in all processes what the first one raises, instead of leaving the others waiting.

    All processes must enter this context. Errors of the other processes stay theirs.

    Args:
        kinds: the classes of errors to share; their instances must be picklable.
    """
    # Here, as programs answer wrong arguments without PyTorch.
    from detectron2.utils import comm

    error = None
    try:
        yield
    except kinds as raised:
        if not comm.is_main_process():
            raise
        error = raised
    error = comm.all_gather(error)[0]
    if error is not None:
        raise error
