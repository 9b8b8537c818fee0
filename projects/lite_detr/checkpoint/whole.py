"""Which of a folder's checkpoints is the last that is whole."""

import logging
import os
import zipfile
from collections.abc import Iterable
from typing import Any

from ..errors import WeightsError
from .files import read_torch

logger = logging.getLogger("lite_detr")


def last_whole(latest: str, others: Iterable[str]) -> str:
    """The checkpoint to resume from; those that are broken are named in a warning.

    Args:
        latest: the file that the training saved last.
        others: those to fall back on, of which the one that was written last is taken. A folder may
            hold those of an older training, which came further.

    Raises:
        WeightsError: none is whole.
    """
    broken = []
    if is_whole(latest, broken):
        return latest
    for path in sorted(others, key=os.path.getmtime, reverse=True):
        if is_whole(path, broken):
            logger.warning("%s. Going on from %s instead", "; ".join(broken), path)
            return path
    raise WeightsError(
        f"there is nothing to resume from: {'; '.join(broken)}. To start anew, leave out --resume "
        "or set another train.output_dir"
    )


def is_whole(path: str, broken: list[str]) -> bool:
    """Whether a file is a training's, and all of it; otherwise ``broken`` says what is wrong."""
    content = read_if_possible(path, broken)
    if content is None:
        return False
    if not isinstance(content, dict) or "iteration" not in content:
        broken.append(f"weights {path} are of no training")
        return False
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # Reads all of it and compares checksums, which torch.load does not.
            damaged = archive.testzip()
        if damaged is not None:
            broken.append(f"weights {path} are damaged: {damaged} is not what was written")
            return False
    return True


def read_if_possible(path: str, broken: list[str]) -> Any:
    """What a checkpoint holds, without reading its tensors; None where ``broken`` says why."""
    try:
        return read_torch(path, mmap=zipfile.is_zipfile(path))
    except WeightsError as error:
        broken.append(str(error))
    except (OSError, ValueError) as error:
        # Of a tag that is no name, such as the zeros that a crash may leave.
        broken.append(f"weights {path!r} cannot be read: {error}")
    return None
