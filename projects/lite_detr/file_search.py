"""Search folders for files."""

import os
from collections.abc import Iterator
from pathlib import Path


def walk_files(root: Path, exclude: Path | None = None) -> Iterator[Path]:
    """Yield the files below a folder, folder by folder in the order of their names.

    Hidden files and folders, and those that macOS adds to archives, are left out. Links are
    followed, but no folder is searched twice, as links may lead back to one above them.

    Args:
        root: the folder.
        exclude: a folder in it to leave out; not the root itself.
    """
    seen = {os.path.realpath(exclude)} if exclude else set()
    seen.discard(os.path.realpath(root))
    for folder, subfolders, names in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        if here in seen:
            subfolders.clear()
            continue
        seen.add(here)
        subfolders[:] = sorted(n for n in subfolders if not n.startswith((".", "__MACOSX")))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))
