"""Files that are either written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..errors import SaveError

# What an unfinished file is called: its name and this.
UNFINISHED = ".unfinished"


@contextmanager
def atomic_open(path: str | os.PathLike, mode: str) -> Iterator[IO]:
    """A file to write, which takes its name only when it is whole and on the disk.

    Whatever happens before, a kill or a full disk, a file that had this name keeps it.

    Args:
        path: a local one.
        mode: ``w`` or ``wb``.

    Raises:
        SaveError: it cannot be written. What was written so far is removed.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with open(unfinished, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        # PyTorch's own writer has an error of its own behind what the system says.
        if isinstance(error, (OSError, RuntimeError)):
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise SaveError(
                f"{path} cannot be written: {reason}. The files in {path.parent} are as they were: "
                "make room there, and go on with --resume"
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Removes what a process that was killed while it wrote has left in a folder."""
    for path in Path(folder).glob(f"*{UNFINISHED}"):
        path.unlink(missing_ok=True)


class AtomicFiles:
    """A path manager of iopath's that writes local files whole or not at all.

    Other than local files, which a prefix such as ``s3://`` tells, are left to their handlers.
    """

    def __init__(self, path_manager: Any):
        self._path_manager = path_manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **options: Any) -> Any:
        if "w" in mode and "://" not in path:
            return atomic_open(path, mode)
        return self._path_manager.open(path, mode, **options)
