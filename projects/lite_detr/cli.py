"""The command line that all programs share.

Argument types, images given as files, patterns or folders, and the end of a program: one line for
an error that its user can mend, a traceback for one that only we can.
"""

import argparse
import glob
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import SaveError, user_message
from .file_search import walk_files
from .labels import printable

# The names in ``lite_detr.inference.DTYPES``, which imports PyTorch.
DTYPES = ("float32", "bfloat16", "float16")
# Detectron2 and fvcore compile functions, find files and set options in ways that are outdated, and
# TorchScript files are still wanted.
IGNORED_WARNINGS = (
    (r"`torch\.jit\.\w+` is deprecated", FutureWarning),
    (r"`torch\.jit\.\w+` is deprecated", DeprecationWarning),
    ("pkg_resources is deprecated", UserWarning),
    ("`broadcast_buffers` is deprecated", FutureWarning),
)
# PyTorch looks for CUDA's compiler also without a GPU, when Detectron2 describes the machine; the
# others repeat what our own error says.
IGNORED_RECORDS = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "iopath.common.download": "Failed to download",
    "torch.multiprocessing.spawn": "Terminating process",
}
# The suffixes that a folder is searched for; a file named on the command line may have any.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Files with these are videos, wherever they are named.
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
# Bytes of a picture's name before its number and its suffix.
MAX_STEM = 240
# How long the other processes of a job leave it to the first one to print what happened to all.
PATIENCE = 20.0  # seconds


@contextmanager
def user_errors(status: int = 1) -> Iterator[None]:
    """End the process with one line on stderr for an error that its user can mend.

    Also a decorator: ``@user_errors()`` on a program's ``main``. If one process of a job ends, its
    launcher ends the others; all but the first wait before they print, so that an error common to
    all is printed once.

    An interrupt from the keyboard also ends it with one line, and the exit status of shells.

    Args:
        status: the exit status.
    """
    try:
        yield
    except KeyboardInterrupt:
        # The process that started this one has got it too, and says so.
        if multiprocessing.parent_process() is None:
            print("error: interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        message = user_message(error)
        if not message:
            raise
        if not is_first_process():
            time.sleep(PATIENCE)
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(status)


def ignore_warnings() -> None:
    """Ignore warnings about what dependencies do, which no user can mend."""
    for message, category in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message, category)
    for name, message in IGNORED_RECORDS.items():
        logging.getLogger(name).addFilter(
            lambda record, message=message: message not in str(record.msg)
        )


def is_first_process() -> bool:
    """Return whether this is the first process of a job; True outside a job."""
    # Importing it takes seconds, and a process that has not done so is in no job.
    comm = sys.modules.get("detectron2.utils.comm")
    return comm is None or comm.is_main_process()


class Parser(argparse.ArgumentParser):
    """A parser of options among config overrides, see :func:`add_overrides`."""

    def parse_intermixed_args(self, args=None, namespace=None) -> argparse.Namespace:
        # Unknown options come first: the value of one would be taken for an override.
        parsed = super().parse_intermixed_args(args, namespace)
        for text in getattr(parsed, "opts", ()):
            try:
                key_value(text)
            except argparse.ArgumentTypeError as error:
                self.error(str(error))
        return parsed


def make_parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser whose help starts with a program's docstring, line by line.

    ``%(prog)s`` in the docstring is the program's name.
    """
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_config_file(parser: argparse.ArgumentParser, **options) -> None:
    """Add ``--config-file``; ``options`` are those of ``add_argument``."""
    options = {"required": True, "metavar": "C", "help": "a file or a model zoo name"} | options
    parser.add_argument("--config-file", **options)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the config overrides, ``key=value`` after all other arguments, as ``opts``."""
    parser.add_argument("opts", nargs="*", metavar="key=value", help="change values of the config")


def add_optimize(parser: argparse.ArgumentParser, condition: str = "") -> None:
    """Add ``--optimize``; ``condition`` begins its help."""
    parser.add_argument(
        "--optimize",
        choices=DTYPES,
        metavar="DTYPE",
        help=f"{condition}run faster: lite_detr.optimize_for_inference, in {', '.join(DTYPES)}",
    )


def key_value(text: str) -> str:
    """Argument type: a config override, unchanged."""
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"given {text}, accepted are options like key=value")
    return text


def whole_number(minimum: int) -> Callable[[str], int]:
    """Argument type: an integer of at least ``minimum``."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(
                f"given {text}, accepted are whole numbers from {minimum} on"
            )
        return value

    return number


def score(text: str) -> float:
    """Argument type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"given {text}, accepted are numbers from 0 to 1")
    return value


def size(text: str) -> tuple[int, int]:
    """Argument type: ``HEIGHTxWIDTH`` -> (height, width)."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"given {text}, accepted is HEIGHTxWIDTH like 800x1066")
    return int(height), int(width)


def point(text: str) -> tuple[float, float]:
    """Argument type: ``X,Y`` -> (x, y)."""
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"given {text}, accepted is X,Y like 320,240") from None
    return x, y


def folder(text: str) -> Path:
    """Argument type: a folder that exists or can be created."""
    path = Path(text)
    try:
        is_other = path.exists() and not path.is_dir()
    # Of a name that no file can have.
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[:100]}: {error.strerror}") from None
    if is_other:
        raise argparse.ArgumentTypeError(f"{text} is a file; give a folder")
    return path


def folder_or_file(*suffixes: str) -> Callable[[str], Path]:
    """Argument type: a folder, or the name of a file to write, which ends in one of the suffixes.

    :func:`names_file` tells them apart.
    """

    def path(text: str) -> Path:
        return Path(text) if names_file(Path(text), suffixes) else folder(text)

    return path


def names_file(path: Path, suffixes: Sequence[str]) -> bool:
    """Return whether an output is a file with one of the suffixes, and not a folder so called."""
    return path.suffix.lower() in suffixes and not path.is_dir()


def file_name(suffix: str) -> Callable[[str], Path]:
    """Argument type: the name of a file to write, which ends in ``suffix``."""

    def path(text: str) -> Path:
        if Path(text).suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(
                f"given {text}, accepted are names that end in {suffix}"
            )
        return Path(text)

    return path


def find_images(
    given: Sequence[str],
    suffixes: Sequence[str] = IMAGE_SUFFIXES,
    exclude: Path | None = None,
) -> tuple[dict[Path, Path], list[str]]:
    """Find the images that files, patterns and folders name.

    Folders are searched with their sub-folders, but not hidden ones.

    Args:
        given: the names.
        suffixes: of the files to find in folders.
        exclude: a folder that is not searched, such as that of the output.

    Returns:
        The images, each once, with the path of their folder in the one that was given; and the
        arguments that name none.
    """
    images: dict[Path, Path] = {}
    missing = []
    for text in given:
        found = expand(text, suffixes, exclude)
        if not found:
            missing.append(text)
        for path, below in found:
            images.setdefault(path, below)
    return images, missing


def expand(text: str, suffixes: Sequence[str], exclude: Path | None) -> list[tuple[Path, Path]]:
    path = Path(text)
    try:
        if path.is_dir():
            return search(path, suffixes, exclude)
        # Before it is taken for a pattern, as names may hold brackets.
        if path.is_file():
            return [(path, Path())]
    # A folder that cannot be read, or a name that no file can have.
    except OSError:
        return []
    matches = sorted(match for match in map(Path, glob.glob(text)) if match.is_file())
    return [(match, Path()) for match in matches]


def search(root: Path, suffixes: Sequence[str], exclude: Path | None) -> list[tuple[Path, Path]]:
    """Return the files in a folder and its sub-folders; see :func:`find_images`."""
    # What was named is searched even if output goes there.
    return [
        (file, file.parent.relative_to(root))
        for file in walk_files(root, exclude)
        if file.suffix.lower() in suffixes and file.is_file()
    ]


def picture_paths(
    images: Mapping[Path, Path], folder: Path, suffix: str = ".png"
) -> Iterator[Path]:
    """Yield where each image's picture goes: never onto another's, nor onto one of the images.

    Its folder is created if need be.

    Args:
        images: those of :func:`find_images`; their pictures are in like sub-folders.
        folder: for all pictures.
        suffix: of the pictures.
    """
    taken = {image.resolve() for image in images}
    for image, below in images.items():
        stem = image.stem
        # File systems take names of 255 bytes.
        while len(os.fsencode(stem)) > MAX_STEM:
            stem = stem[:-1]
        numbered = (f"{stem}_{number}{suffix}" for number in itertools.count(2))
        names = itertools.chain([f"{stem}{suffix}"], numbered)
        paths = (folder / below / name for name in names)
        path = next(path for path in paths if path.resolve() not in taken)
        taken.add(path.resolve())
        if not path.parent.is_dir():
            make_folder(path.parent)
        yield path


def make_folder(path: Path) -> None:
    """Create a folder to write to, if need be.

    Raises:
        SaveError: it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise SaveError(
            f"{printable(path)} cannot be written to ({error.strerror}): give another folder"
        ) from error


def make_file(path: Path) -> None:
    """Create a file to write, empty, and its folder; raise ``SaveError`` if that cannot be done."""
    make_folder(path.parent)
    try:
        path.open("w").close()
    except OSError as error:
        raise SaveError(
            f"{printable(path)} cannot be written ({error.strerror}): give another file"
        ) from error
