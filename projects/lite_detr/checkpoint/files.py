"""Files of weights: read without running what they may hold, and written whole or not at all."""

import logging
import os
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SaveError, WeightsError
from ..labels import first_line
from .pickles import TensorUnpickler
from .rebuild import STORAGES, ForbiddenGlobal, Global, Storage, expect

logger = logging.getLogger("lite_detr")

# What an unfinished file is called: its name and this.
UNFINISHED = ".unfinished"
ZIP_MAGIC = b"PK\x03\x04"
# The first two values of files that PyTorch wrote before version 1.6.
OLD_MAGIC = (0x1950A86A20F9469CFC6C, 1001)

# Where files keep a moving average of their weights, where the weights, and where both have them.
AVERAGES = ("ema", "model_ema", "ema_model", "ema_state", "ema_state_dict", "state_dict_ema")
AVERAGES += ("params_ema",)
WEIGHTS = ("model", "state_dict", "model_state", "model_state_dict", "params", "weights", "net")
WRAPPERS = ("module", "model", "state_dict", "model_state_dict")
INNER = (
    (),
    *((name,) for name in WRAPPERS),
    *((outer, inner) for outer in WRAPPERS for inner in WRAPPERS),
)
# In training checkpoints of ours.
OUR_AVERAGE = "ema"


def read_weights(path: str) -> Mapping[str, Any]:
    """Return the weights of a file.

    Args:
        path: ``.safetensors`` and ``.pkl`` files by their suffixes, all others as ``torch.save``'s.

    Raises:
        WeightsError: the file is broken, would run code, or holds no weights.
    """
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    return find_weights(read_pickle(path) if path.endswith(".pkl") else read_torch(path), path)


def read_pickle(path: str) -> Any:
    """Return what a pickle of arrays holds, as Detectron2's model zoo has them.

    Raises:
        WeightsError: the file is broken, or refers to what could run code.
    """
    with explained(path), open(path, "rb") as file:
        return TensorUnpickler().load(file)


def read_torch(path: str, *, meta: bool = False) -> Any:
    """Return what a file of ``torch.save`` holds: dense tensors, arrays and plain values.

    Checksums are compared, which ``torch.load`` does not do. The references keep their command
    lines as an ``argparse.Namespace``, which is accepted also.

    Args:
        path: a local file.
        meta: tensors have no values, and are not read.

    Raises:
        WeightsError: the file is broken, or refers to what could run code.
    """
    device = "meta" if meta else "cpu"
    with explained(path), open(path, "rb") as file:
        if file.read(4) == ZIP_MAGIC:
            return read_archive(file, device)
        file.seek(0)
        return read_old(file, device)


def read_archive(file: IO[bytes], device: str) -> Any:
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        expect(len(entries) == len(archive.infolist()), "two entries of one name")
        expect(
            all(i.compress_type == zipfile.ZIP_STORED for i in entries.values())
            and sum(info.file_size for info in entries.values()) <= size,
            "compressed entries",
        )
        folders = [name.removesuffix("data.pkl") for name in entries if is_content(name)]
        expect(len(folders) == 1, "no data.pkl, or more than one")
        folder = folders[0]
        if f"{folder}byteorder" in entries:
            order = archive.read(f"{folder}byteorder").decode()
            expect(order == sys.byteorder, f"tensors in {order}-endian byte order")
        storages: dict[str, Tensor] = {}

        def load_storage(identifier: Any) -> Storage:
            key, dtype, size = checked_storage(identifier)
            name = f"{folder}data/{key}"
            if key not in storages:
                expect(entries[name].file_size == size, "a storage of another size than it says")
                storages[key] = torch.empty(size, dtype=torch.uint8, device=device)
                if device != "meta":
                    # Reading to the end compares the checksum.
                    content = np.frombuffer(archive.read(name), np.uint8)
                    storages[key].numpy()[:] = content
            expect(len(storages[key]) == size, "a storage of two sizes")
            return Storage(storages[key], dtype)

        with archive.open(f"{folder}data.pkl") as content:
            return TensorUnpickler(load_storage).load(content)


def is_content(name: str) -> bool:
    return name.endswith("/data.pkl") and name.count("/") == 1


def read_old(file: IO[bytes], device: str) -> Any:
    """Return what a file holds that PyTorch wrote before version 1.6; it has no checksums."""
    start = tuple(TensorUnpickler().load(file) for _ in OLD_MAGIC)
    expect(start == OLD_MAGIC, "nothing that PyTorch wrote")
    system = TensorUnpickler().load(file)
    expect(system["little_endian"] == (sys.byteorder == "little"), "tensors in other byte order")
    left = os.fstat(file.fileno()).st_size
    storages: dict[str, tuple[Tensor, int]] = {}

    def load_storage(identifier: Any) -> Storage:
        nonlocal left
        *identifier, view = identifier
        key, dtype, size = checked_storage(tuple(identifier))
        if key not in storages:
            left -= size
            expect(left >= 0, "storages that are larger than the file")
            storages[key] = torch.empty(size, dtype=torch.uint8, device=device), dtype.itemsize
        data = storages[key][0]
        expect(len(data) == size, "a storage of two sizes")
        if view is not None:
            _, offset, length = view
            data = data[offset * dtype.itemsize : (offset + length) * dtype.itemsize]
        return Storage(data, dtype)

    content = TensorUnpickler(load_storage).load(file)
    keys = TensorUnpickler().load(file)
    expect(type(keys) is list and set(keys) == set(storages), "other storages than it refers to")
    for key in keys:
        data, itemsize = storages[key]
        count = int.from_bytes(file.read(8), sys.byteorder)
        expect(count * itemsize == len(data), "a storage of another size than it says")
        if device != "meta":
            expect(file.readinto(data.numpy()) == len(data), "too few bytes")
        else:
            file.seek(len(data), os.SEEK_CUR)
    expect(file.tell() <= os.fstat(file.fileno()).st_size, "too few bytes")
    return content


def checked_storage(identifier: Any) -> tuple[str, torch.dtype, int]:
    """Return a storage's key, the type of its elements, and its size in bytes."""
    kind, storage, key, _, count = identifier
    expect(kind == "storage" and isinstance(storage, Global), "a reference to something else")
    expect(type(key) is str and type(count) is int and count >= 0, "a storage without a size")
    dtype = STORAGES[storage.name]
    return key, dtype, count * dtype.itemsize


def read_safetensors(path: str) -> dict[str, Tensor]:
    """Return the weights of a file of the safetensors format, which has no checksums.

    Raises:
        WeightsError: the library is not installed, or the file is broken.
    """
    library = import_safetensors(path)
    with explained(path):
        return library.torch.load_file(path)


def import_safetensors(path: str) -> ModuleType:
    """Return the library, for a file to read or to write."""
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise WeightsError(
            f"weights {path} are in the safetensors format, for which the library is missing: "
            "pip install safetensors"
        ) from None
    return safetensors


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn whatever reading a broken or hostile file raises into a :class:`WeightsError`."""
    try:
        yield
    except WeightsError:
        raise
    except ForbiddenGlobal as error:
        raise WeightsError(
            f"weights {path} are refused: they refer to {first_line(error)}, which could run code. "
            "Accepted are dense tensors, arrays of numbers, plain containers and argparse.Namespace"
        ) from error
    # Each library has errors of its own for each way in which bytes can be wrong, and Python others
    # for values that nothing expects: a file that cannot be read is broken, whatever they say.
    except Exception as error:
        raise WeightsError(
            f"weights {path} are broken, or not a checkpoint: {first_line(error)}"
        ) from error


def find_weights(content: Any, path: str) -> Mapping[str, Any]:
    """Return the weights of :func:`locate_weights`."""
    return locate_weights(content, path)[0]


def locate_weights(content: Any, path: str) -> tuple[Mapping[str, Any], str]:
    """Find the weights among what a file holds, which may lie below other names.

    A moving average is preferred to the weights of the last iteration, and a line in the log says
    so. A training checkpoint of ours is the exception: training goes on from its weights, and
    ``model_final_ema.pth`` has the average alone.

    Returns:
        The weights, and the names that they lie below, such as ``ema_state.module``; empty if they
        are the file.

    Raises:
        WeightsError: there are none.
    """
    if isinstance(content, Mapping):
        averages = averages_in(content)
        for name in (*averages, *WEIGHTS):
            for inner in INNER:
                weights = content.get(name)
                for key in inner:
                    weights = weights.get(key) if isinstance(weights, Mapping) else None
                if has_tensors(weights):
                    where = ".".join((name, *inner))
                    if name in averages:
                        logger.info("weights %s: using the moving average under %s", path, where)
                    return weights, where
        if has_tensors(content):
            return content, ""
        named = [name for name in WEIGHTS if isinstance(content.get(name), Mapping)]
        if named:
            return content[named[0]], named[0]
    raise WeightsError(f"weights {path} hold no weights, but {described(content)}")


def averages_in(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names below which a file may have the moving average of its weights."""
    meta = content.get("meta")
    if "message_hub" in content or (isinstance(meta, Mapping) and "mmengine_version" in meta):
        # MMEngine swaps the two when it saves.
        return ("state_dict",) if "ema_state_dict" in content else ()
    if "trainer" in content or "iteration" in content:
        return tuple(name for name in AVERAGES if name != OUR_AVERAGE)
    return AVERAGES


def has_tensors(content: Any) -> bool:
    return isinstance(content, Mapping) and any(
        isinstance(value, (Tensor, np.ndarray)) for value in content.values()
    )


def described(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a value of type {type(content).__name__}"
    names = ", ".join(first_line(repr(name), 40) for name in list(content)[:5])
    return f"a dict with the keys {names}" if content else "an empty dict"


@contextmanager
def atomic_open(path: str | os.PathLike, mode: str) -> Iterator[IO]:
    """Open a file to write, which takes its name only when it is complete and on the disk.

    Whatever happens before, a kill or a full disk, a file that had this name keeps it. A missing
    folder is created.

    Args:
        path: a local path.
        mode: ``w`` or ``wb``.

    Raises:
        SaveError: the file cannot be written. What was written so far is removed.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        # PyTorch's writer raises an error of its own on top of the system's.
        if isinstance(error, (OSError, RuntimeError)):
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise SaveError(
                f"{path} cannot be written: {reason}. The files in {path.parent} are as they were: "
                "make room there; --resume continues a training run"
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove what a process left in a folder that was killed while it wrote."""
    for path in Path(folder).glob(f"*{UNFINISHED}"):
        path.unlink(missing_ok=True)


class AtomicFiles:
    """A path manager of iopath that writes local files completely or not at all.

    Files elsewhere, which have a prefix such as ``s3://``, are left to their handlers.
    """

    def __init__(self, path_manager: Any):
        self._path_manager = path_manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **options: Any) -> Any:
        if "w" in mode and "://" not in path:
            return atomic_open(path, mode)
        return self._path_manager.open(path, mode, **options)
