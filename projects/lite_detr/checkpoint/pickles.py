"""Read pickles of tensors, arrays and plain values, without calling anything that they name.

Python's unpickler calls what a pickle refers to, with arguments and states of the pickle's choice.
A list of allowed names is then as safe as every function on it, and NumPy's are not: given a state
that it did not write, ``numpy.dtype`` follows pointers. So this one interprets the opcodes itself.
A name is a key of a table in ``rebuild.py``, whose functions check what they are given; nothing is
looked up, imported or called by its name, no object's own ``__setstate__`` runs, and no
process-wide list is read or changed.
"""

import argparse
import pickletools
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import IO, Any

import numpy as np
import torch

from .rebuild import (
    KEYS,
    NUMERIC,
    ArrayType,
    Discarded,
    ForbiddenGlobal,
    Global,
    Storage,
    UnfinishedArray,
    checked_key,
    expect,
    find_global,
    finish_array,
)

# Opcodes whose argument is a value, as the standard library decodes it.
VALUES = set(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8".split()
)
MAPPINGS = (dict, OrderedDict, Counter, defaultdict)
CONTAINERS = (dict, list, tuple, argparse.Namespace)
COPIED = (str, bytes, bytearray, list, dict)
PLAIN = (*KEYS, complex, bytearray, torch.dtype, torch.device)
# What a checkpoint nests is a tenth of this deep.
MAX_DEPTH = 64
MARK = object()


class TensorUnpickler:
    """Interprets the opcodes of one pickle.

    Args:
        load_storage: returns the :class:`Storage` of a persistent id of PyTorch's.
    """

    def __init__(self, load_storage: Callable[[Any], Storage] | None = None):
        self.load_storage = load_storage

    def load(self, file: IO[bytes]) -> Any:
        """Return what the pickle at the file's position holds.

        Raises:
            ForbiddenGlobal: the pickle refers to what is not in ``REBUILD``.
            Exception: what ``pickletools`` and the functions here raise on a broken pickle.
        """
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0
        start = file.tell()
        for opcode, arg, _ in pickletools.genops(file):
            self._run(opcode.name, arg)
            # What is remembered could be copied again and again, beyond all memory.
            expect(self.copied <= 4 * (file.tell() - start) + 1000, "too many copies of one value")
        (value,) = self.stack
        check_depth(value)
        return value

    def _run(self, name: str, arg: Any) -> None:
        stack = self.stack
        if name in VALUES:
            stack.append(arg)
            return
        match name:
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._remember(arg)
            case "MEMOIZE":
                self._remember(len(self.memo))
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[arg])
            case "MARK":
                stack.append(MARK)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                expect(len(stack) >= count, "an opcode without its arguments")
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack.append(tuple(self._pop_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(self._pop_mark())
            case "APPEND" | "APPENDS":
                items = self._pop_mark() if name == "APPENDS" else [stack.pop()]
                expect(type(stack[-1]) is list, "items of something other than a list")
                stack[-1].extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = self._pop_mark()
                stack.append({})
                set_items(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = self._pop_mark()
                set_items(stack[-1], items)
            case "EMPTY_SET":
                stack.append(set())
            case "ADDITEMS":
                items = self._pop_mark()
                expect(type(stack[-1]) is set, "items of something other than a set")
                stack[-1].update(map(checked_key, items))
            case "FROZENSET":
                stack.append(frozenset(map(checked_key, self._pop_mark())))
            case "GLOBAL":
                stack.append(find_global(arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                last, module = stack.pop(), stack.pop()
                stack.append(find_global(f"{module}.{last}"))
            case "REDUCE" | "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                expect(isinstance(function, Global), "a call of something that is not a name")
                expect(isinstance(args, tuple), "a call without arguments")
                self.copied += sum(len(a) for a in args if isinstance(a, COPIED))
                stack.append(function.rebuild(args))
            case "BUILD":
                state = stack.pop()
                stack[-1] = self._build(stack[-1], state)
            case "PERSID" | "BINPERSID":
                expect(self.load_storage is not None, "a reference to another file")
                stack.append(self.load_storage(arg if name == "PERSID" else stack.pop()))
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:
                raise ForbiddenGlobal(f"something by the opcode {name}")

    def _remember(self, index: int) -> None:
        value = self.memo[index] = self.stack[-1]
        if isinstance(value, UnfinishedArray):
            value.memo.append(index)

    def _pop_mark(self) -> list[Any]:
        """Remove everything down to the last mark and return it, without the mark."""
        items = []
        while (item := self.stack.pop()) is not MARK:
            items.append(item)
        return items[::-1]

    def _build(self, target: Any, state: Any) -> Any:
        """Return an object with its state."""
        if isinstance(target, UnfinishedArray):
            array = finish_array(state)
            self.copied += array.nbytes
            for index in target.memo:
                self.memo[index] = array
            return array
        if isinstance(target, ArrayType):
            target.set_state(state)
        elif isinstance(target, Discarded):
            pass
        elif type(target) is argparse.Namespace and type(state) is dict:
            expect(all(type(name) is str for name in state), "attributes without names")
            vars(target).update(state)
        elif type(target) is OrderedDict and type(state) is dict:
            # The versions of a state dict's modules; other attributes have no use.
            versions = state.get("_metadata")
            if isinstance(versions, dict) and all(type(v) is dict for v in versions.values()):
                target._metadata = versions
        else:
            expect(False, f"a state for a {type(target).__name__}")
        return target


def set_items(target: Any, items: Sequence[Any]) -> None:
    expect(type(target) in MAPPINGS and len(items) % 2 == 0, "items of something other than a dict")
    for key, value in zip(items[::2], items[1::2]):
        target[checked_key(key)] = value


def check_depth(value: Any) -> None:
    """Refuse containers that are nested too deeply for those who walk them, or in themselves."""
    level = {id(value): value}
    for _ in range(MAX_DEPTH):
        below = {}
        for outer in level.values():
            if isinstance(outer, argparse.Namespace):
                outer = vars(outer)
            if isinstance(outer, dict):
                outer = outer.values()
            elif type(outer) not in (list, tuple):
                continue
            below.update((id(inner), inner) for inner in outer if isinstance(inner, CONTAINERS))
        if not below:
            return
        level = below
    expect(False, f"containers in containers, {MAX_DEPTH} levels deep")


def unreadable_part(value: Any, name: str, depth: int = 0) -> str:
    """Return which part of a value could be written but not read again; empty if there is none.

    Args:
        value: what is to be written.
        name: what to call it.
        depth: the number of containers around it.
    """
    if depth >= MAX_DEPTH:
        return f"{name} is nested too deeply"
    kind = type(value)
    if kind is argparse.Namespace:
        kind, value = dict, vars(value)
    if kind in MAPPINGS:
        for key, inner in value.items():
            if part := unreadable_key(key, name) or unreadable_part(
                inner, f"{name}.{key}", depth + 1
            ):
                return part
        return ""
    if kind in (list, tuple, torch.Size):
        parts = (unreadable_part(v, f"{name}.{i}", depth + 1) for i, v in enumerate(value))
        return next(filter(None, parts), "")
    if kind in (set, frozenset):
        return next(filter(None, (unreadable_key(key, name) for key in value)), "")
    if kind in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        is_dense = value.layout == torch.strided and not (value.is_meta or value.is_quantized)
        is_direct = not (value.is_conj() or value.is_neg())
        return "" if is_dense and is_direct else f"{name} is a tensor without plain values"
    if isinstance(value, (np.ndarray, np.generic)):
        return "" if NUMERIC.fullmatch(value.dtype.str[1:]) else f"{name} is of {value.dtype}"
    if kind in PLAIN:
        return ""
    return f"{name} is of type {kind.__module__}.{kind.__qualname__}"


def unreadable_key(key: Any, name: str) -> str:
    kinds = set(map(type, key if type(key) is tuple else (key,)))
    return "" if kinds.issubset(KEYS) else f"{name} has the key {key!r}"
