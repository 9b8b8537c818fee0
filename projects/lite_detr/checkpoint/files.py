"""Reads files of weights without running what they may hold besides."""

import argparse
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import WeightsError

# What a pickle of arrays and plain containers refers to, by numpy's names in versions 1 and 2.
PICKLE_GLOBALS = {
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
}


# What torch and pickle raise on files of other kinds.
BROKEN = (
    EOFError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays in plain containers, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PICKLE_GLOBALS:
            raise ForbiddenGlobal(f"{module}.{name}")
        # Protocol 2 writes bytes as text in Latin-1, and any other codec would be imported.
        return encode_latin1 if name == "encode" else super().find_class(module, name)


def encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ForbiddenGlobal(f"the codec {encoding}")
    return text.encode("latin1")


class ForbiddenGlobal(pickle.UnpicklingError):
    """A pickle refers to something that could run code."""


def read_weights(path: str) -> Any:
    """The weights of a file: those under ``model`` where it holds more, and else all of it.

    Args:
        path: of a file; ``.safetensors`` and ``.pkl`` by their endings, others by ``torch.load``.

    Raises:
        WeightsError: the file is broken, or would run code.
    """
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    content = read_pickle(path) if path.endswith(".pkl") else read_torch(path)
    return content["model"] if isinstance(content, Mapping) and "model" in content else content


def read_pickle(path: str) -> Any:
    """A pickle of arrays, as Detectron2's model zoo has.

    Raises:
        WeightsError: the file is broken, or refers to what could run code, which is not run.
    """
    with open(path, "rb") as file, explained(path):
        return ArrayUnpickler(file, encoding="latin1").load()


def read_torch(path: str, mmap: bool = False) -> Any:
    """A file of ``torch.save``: tensors, plain containers and ``argparse.Namespace``.

    The references keep their command lines as such a namespace, which has attributes and no code.

    Args:
        path: of the file.
        mmap: tensors are read from the file only when they are used.

    Raises:
        WeightsError: the file is broken, or refers to what could run code, which is not run.
    """
    with explained(path), torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            if match := re.search(r"GLOBAL (\S+)", str(error)):
                raise ForbiddenGlobal(match[1]) from error
            raise


def read_safetensors(path: str) -> dict[str, torch.Tensor]:
    """A file of the safetensors format.

    Raises:
        WeightsError: the library is not installed, or the file is broken.
    """
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise WeightsError(
            f"weights {path} are in the safetensors format, for which the library is missing: "
            "pip install safetensors"
        ) from None
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise WeightsError(f"weights {path} are no checkpoint: {error}") from error


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turns what reading a broken or hostile file raises into a :class:`WeightsError`."""
    try:
        yield
    except WeightsError:
        raise
    except ForbiddenGlobal as error:
        raise WeightsError(
            f"weights {path} are refused: they refer to {error}, which could run code. Accepted "
            "are tensors, plain containers and argparse.Namespace, and arrays in a .pkl file"
        ) from error
    except BROKEN as error:
        raise WeightsError(f"weights {path} are no checkpoint: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
