"""Rebuild what a pickle of tensors and arrays refers to, of arguments that nobody has checked.

Each function takes the arguments that a pickle gives, and returns a plain value, a dense tensor, or
an array of numbers; it raises ``UnpicklingError``, or whatever Python raises, for anything else.
"""

import argparse
import math
import pickle
import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NUMERIC = re.compile(r"b1|[iu][1248]|f[248]|c8|c16")
KEYS = (str, int, float, bool, bytes, type(None))
# Elements of a tensor whose strides repeat those of its storage.
MAX_REPEATED = 2**24


class ForbiddenGlobal(pickle.UnpicklingError):
    """A pickle refers to something that could run code."""


class Storage(NamedTuple):
    """The bytes of a tensor's storage, and the type of its elements."""

    data: Tensor
    dtype: torch.dtype


class ArrayType:
    """A NumPy dtype that is being read."""

    def __init__(self, kind: Any, *_: Any):
        expect(isinstance(kind, str) and NUMERIC.fullmatch(kind), f"an array of type {kind!r}")
        self.dtype = np.dtype(kind)

    def set_state(self, state: Any) -> None:
        """Take the byte order from a state, and nothing else."""
        expect(
            isinstance(state, tuple)
            and len(state) >= 5
            and state[1] in ("<", ">", "|", "=")
            and all(part is None for part in state[2:5]),
            "an array of a structured type",
        )
        self.dtype = self.dtype.newbyteorder(state[1])


class UnfinishedArray:
    """An array whose content has not been read yet; ``memo`` lists where it is remembered."""

    def __init__(self, *_: Any):
        self.memo: list[int] = []


class Discarded:
    """What a checkpoint holds that nobody reads, such as MMEngine's log of the training run."""

    def __init__(self, *_: Any):
        pass


def expect(condition: Any, found: str) -> None:
    if not condition:
        raise pickle.UnpicklingError(f"it holds {found}, which is not accepted")


class Global(NamedTuple):
    """A name in a pickle, and what stands for it here."""

    name: str
    rebuild: Callable[[tuple], Any]


def find_global(name: str) -> Any:
    """Return what stands for a name: a :class:`Global`, or one of PyTorch's dtypes.

    Raises:
        ForbiddenGlobal: nothing does.
    """
    if name in DTYPES:
        return DTYPES[name]
    try:
        return Global(name, REBUILD[name])
    except KeyError:
        raise ForbiddenGlobal(name) from None


def checked_key(key: Any) -> Any:
    """Return a key of a dict or an element of a set: a plain value, or a tuple of some."""
    parts = key if type(key) is tuple else (key,)
    # A tuple of tuples may take forever to hash.
    expect(all(type(part) in KEYS for part in parts), f"a key of type {type(key).__name__}")
    return key


def encode(args: tuple) -> bytes:
    """Bytes, which protocol 2 writes as text in Latin-1; any other codec would be imported."""
    text, codec = args
    if codec != "latin1":
        raise ForbiddenGlobal(f"the codec {codec}")
    return text.encode("latin1")


def rebuild_ordered_dict(args: tuple) -> OrderedDict:
    result = OrderedDict()
    for key, value in args[0] if args else ():
        result[checked_key(key)] = value
    return result


def rebuild_counter(args: tuple) -> Counter:
    result = Counter()
    for counts in args:
        expect(type(counts) is dict, "a counter of something other than a dict")
        dict.update(result, counts)
    return result


def rebuild_defaultdict(args: tuple) -> defaultdict:
    factories = {f"builtins.{kind.__name__}": kind for kind in (dict, float, int, list, set, str)}
    if not args or args[0] is None:
        return defaultdict()
    expect(isinstance(args[0], Global), "a defaultdict of a value")
    return defaultdict(factories[args[0].name.replace("__builtin__", "builtins")])


def rebuild_bytes(args: tuple, kind: type = bytes) -> bytes | bytearray:
    if len(args) == 2:
        args = (encode((args[0], args[1].replace("latin-1", "latin1"))),)
    expect(not args or type(args[0]) is bytes, "bytes of something else")
    return kind(*args)


def as_bytes(raw: Any) -> bytes:
    """Return the content of an array; Python 2 wrote it as text, decoded in Latin-1."""
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    expect(isinstance(raw, (bytes, bytearray)), "an array of objects")
    return raw


def make_array(raw: Any, kind: Any, shape: Any, order: str) -> np.ndarray:
    expect(isinstance(kind, ArrayType), "an array without a type")
    array = np.frombuffer(as_bytes(raw), kind.dtype).reshape(checked_sizes(shape), order=order)
    # In this machine's byte order, and writable, as PyTorch wants it.
    return array.astype(array.dtype.newbyteorder("="))


def finish_array(state: Any) -> np.ndarray:
    _, shape, kind, fortran, raw = state
    return make_array(raw, kind, shape, "F" if fortran else "C")


def rebuild_buffer(args: tuple) -> np.ndarray:
    raw, kind, shape, order = args
    return make_array(raw, kind, shape, "F" if order == "F" else "C")


def rebuild_scalar(args: tuple) -> np.generic:
    kind, raw = args
    return make_array(raw, kind, (), "C")[()]


def checked_sizes(sizes: Any) -> tuple[int, ...]:
    expect(
        type(sizes) in (tuple, torch.Size)
        and all(type(n) is int and 0 <= n < 2**60 for n in sizes),
        "a shape that is not one",
    )
    return tuple(sizes)


def rebuild_tensor(args: tuple, dtype: torch.dtype | None = None) -> Tensor:
    """A view of a storage, inside of it. Gradients and hooks are left out.

    Args:
        args: storage, offset, size and stride, and what else PyTorch writes.
        dtype: the elements' type; None for the storage's.
    """
    storage, offset, size, stride, *rest = args
    expect(isinstance(storage, Storage), "a tensor without a storage")
    # The last of PyTorch's arguments says whether values are conjugated or negated.
    expect(not (len(rest) > 2 and rest[2]), "a tensor that is conjugated or negated")
    elements = storage.data.view(dtype or storage.dtype)
    (offset,), size, stride = checked_sizes((offset,)), checked_sizes(size), checked_sizes(stride)
    expect(len(size) == len(stride) and len(size) <= 64, "a tensor without strides")
    count = math.prod(size)
    expect(count <= max(len(elements), MAX_REPEATED), "a tensor larger than its storage")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    expect(not count or last < len(elements), "a tensor that reaches beyond its storage")
    return elements.as_strided(size, stride, offset if count else 0)


def rebuild_typed_tensor(args: tuple) -> Tensor:
    *args, dtype = args[:7]
    expect(isinstance(dtype, torch.dtype), "a tensor without a type")
    return rebuild_tensor(tuple(args), dtype)


def rebuild_subclass(args: tuple) -> Tensor:
    """A tensor with attributes, which are left out."""
    function, kind, inner, *_ = args
    expect(isinstance(function, Global) and isinstance(kind, Global), "a tensor without a class")
    expect(kind.name in TENSORS and "_rebuild" in function.name, "a tensor of another class")
    return function.rebuild(inner)


def rebuild_parameter(args: tuple) -> Tensor:
    expect(isinstance(args[0], Tensor), "a parameter without a tensor")
    return args[0]


def rebuild_device(args: tuple) -> torch.device:
    return torch.device(*args)


def rebuild_complex(args: tuple) -> complex:
    real, imaginary = args
    return complex(float(real), float(imaginary))


def discard_method(args: tuple) -> Discarded:
    """A method of MMEngine's log, which its pickles look up by name; nothing is looked up here."""
    owner, _ = args
    if not (isinstance(owner, Global) and owner.name == MMENGINE_LOG):
        raise ForbiddenGlobal("the attribute of an object")
    return Discarded()


def not_called(args: tuple) -> Any:
    raise pickle.UnpicklingError("it calls what is only a name in checkpoints")


def is_plain(dtype: Any) -> bool:
    return isinstance(dtype, torch.dtype) and not re.search(r"q|bit|x2|\.u?int[1-7]$", str(dtype))


DTYPES = {f"torch.{name}": dtype for name, dtype in vars(torch).items() if is_plain(dtype)}
STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": torch.double,
        "Float": torch.float,
        "Half": torch.half,
        "BFloat16": torch.bfloat16,
        "Long": torch.long,
        "Int": torch.int,
        "Short": torch.short,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexDouble": torch.cdouble,
        "ComplexFloat": torch.cfloat,
    }.items()
} | {"torch.storage.UntypedStorage": torch.uint8}
MMENGINE_LOG = "mmengine.logging.history_buffer.HistoryBuffer"
TENSORS = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
# What stands for each name that a pickle may refer to.
REBUILD: dict[str, Callable[[tuple], Any]] = {
    "_codecs.encode": encode,
    "argparse.Namespace": lambda args: argparse.Namespace(),
    "collections.Counter": rebuild_counter,
    "collections.OrderedDict": rebuild_ordered_dict,
    "collections.defaultdict": rebuild_defaultdict,
    "torch.Size": lambda args: torch.Size(checked_sizes(*args)),
    "torch.device": rebuild_device,
    "torch._tensor._rebuild_from_type_v2": rebuild_subclass,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_typed_tensor,
    MMENGINE_LOG: Discarded,
    "numpy.dtype": lambda args: ArrayType(*args),
    "numpy.ndarray": not_called,
    **dict.fromkeys((*TENSORS, *STORAGES), not_called),
}
# By the names of Python 2 and 3, and of NumPy 1 and 2.
for _builtins in ("builtins", "__builtin__"):
    REBUILD |= {
        f"{_builtins}.bytes": rebuild_bytes,
        f"{_builtins}.bytearray": lambda args: rebuild_bytes(args, bytearray),
        f"{_builtins}.complex": rebuild_complex,
        f"{_builtins}.getattr": discard_method,
        f"{_builtins}.frozenset": lambda args: frozenset(map(checked_key, *args)),
        f"{_builtins}.set": lambda args: set(map(checked_key, *args)),
        **{f"{_builtins}.{kind}": not_called for kind in ("dict", "float", "int", "list", "str")},
    }
for _core in ("numpy.core", "numpy._core"):
    REBUILD |= {
        f"{_core}.multiarray._reconstruct": lambda args: UnfinishedArray(),
        f"{_core}.multiarray.scalar": rebuild_scalar,
        f"{_core}.numeric._frombuffer": rebuild_buffer,
    }
