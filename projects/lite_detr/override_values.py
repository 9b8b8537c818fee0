"""Read the values of overrides: as the text that they are, or with Hydra's grammar.

The key decides, by the value that the config has and by the annotation of the argument that it is.
"""

import collections.abc
import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from .errors import ConfigError
from .labels import first_line

# Keys that hold text, though the config has null: only their names tell.
TEXT_SUFFIXES = ("_json", "_images", "_dir", "_file", "_path")
# Keys of the training loop that may be null, though the config has another value.
NULLABLE = ("train.checkpointer.max_to_keep", "train.init_checkpoint")
NONE = type(None)
NUMBERS = frozenset([int, float])
TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list such as [a,b]",
    dict: "keys and values such as {key:value}",
    NONE: "null",
}


class Accepted(NamedTuple):
    """The types of value that a key accepts, and those of a list's items."""

    types: frozenset[type]
    items: frozenset[type] = frozenset()


ALL_TYPES = frozenset(TYPE_NAMES)
ANYTHING = Accepted(ALL_TYPES, ALL_TYPES)


def read_value(key: str, text: str, accepted: Accepted) -> Any:
    """Read the text of a value for a key.

    Raises:
        ConfigError: it cannot be read, or has another type.
    """
    if text.strip().lower() == "null":
        if NONE in accepted.types:
            return None
        raise wrong_type(key, text, accepted)
    if unquote(text) == "???":
        raise ConfigError(f"{key}=??? cannot be set: OmegaConf takes it for a missing value")
    is_list = text.startswith("[") and list in accepted.types
    is_text = str in accepted.types and not accepted.types & {bool, int, float}
    if "${" in text and text[:1] not in ("[", "{"):
        return unquote(text)
    if is_list and str in accepted.items and not accepted.items & {bool, int, float}:
        return read_texts(key, text)
    if is_text and not is_list and not (text.startswith("{") and dict in accepted.types):
        return unquote(text)
    try:
        value = OmegaConf.to_container(
            LazyConfig.apply_overrides(OmegaConf.create(), [f"value={text}"])
        )["value"]
    except Exception as error:
        # Of the parser, OmegaConf or Python, which limits the digits of a number.
        if str in accepted.types and text[:1] not in "[{'\"":
            return text
        if str not in accepted.types:
            raise wrong_type(key, text, accepted) from error
        raise ConfigError(
            f"{key}={show(text)} cannot be read ({first_line(error)}): put text with brackets or "
            f"quotes in quotes, as in '{key}=\"text\"'"
        ) from error
    if isinstance(value, str) and str in accepted.types:
        return unquote(text)
    if "_" in text and type(value) in NUMBERS and str in accepted.types:
        return text
    if value in (0, 1) and bool in accepted.types and not accepted.types & NUMBERS:
        return bool(value)
    items = value if isinstance(value, list) else ()
    if not (fits(value, accepted.types) and all(fits(item, accepted.items) for item in items)):
        raise wrong_type(key, text, accepted)
    return value


def read_texts(key: str, text: str) -> list[str]:
    """Read a list of texts, as typed."""
    try:
        # To this loader all scalars are text.
        values = yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError:
        values = None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ConfigError(
            f"{key}={show(text)} is not a list such as [a,b]: put items with commas, colons or "
            "brackets in quotes"
        )
    return values


def unquote(text: str) -> str:
    """Remove one pair of quotes around all of a text."""
    quote, inner = text[:1], text[1:-1]
    if quote in ("'", '"') and len(text) > 1 and text[-1] == quote and quote not in inner:
        return inner
    return text


def fits(value: object, accepted: frozenset[type]) -> bool:
    # No key takes NaN for a number; references are checked when all overrides are applied.
    if value != value or (isinstance(value, str) and "${" in value):
        return value == value
    return type(value) in accepted or (type(value) is int and float in accepted)


def accepted_by(cfg: DictConfig, key: str) -> Accepted:
    """Return what a key accepts, by its value and the annotation of the argument that it is."""
    path, _, name = key.rpartition(".")
    owner = OmegaConf.select(cfg, path) if path else cfg
    if name == "_target_":
        return Accepted(frozenset([str]))
    if not OmegaConf.is_config(owner):
        return ANYTHING
    value = OmegaConf.select(cfg, key)
    if not is_called(owner):
        return by_value(key, value)
    argument = arguments_of(owner["_target_"])[0].get(name)
    if argument is not None and argument.annotation is not argument.empty:
        annotated = by_annotation(argument.annotation)
        # What the config has is accepted in any case.
        return annotated if value is None else join(annotated, by_value(key, value))
    if argument is not None and name not in owner and argument.default is not argument.empty:
        value = argument.default
    accepted = by_value(key, value)
    if accepted == ANYTHING or accepted.types == {bool} or key.endswith(TEXT_SUFFIXES):
        return accepted
    # Without an annotation, other types may be accepted as well, but not text for a number.
    more = NUMBERS if accepted.types & (NUMBERS | {list}) else frozenset([dict])
    items = accepted.items or (NUMBERS if more is NUMBERS else accepted.types)
    return Accepted(accepted.types | more | {list, NONE}, items)


def by_value(key: str, value: object) -> Accepted:
    """Return the types that may take the place of a value."""
    if value is None:
        return Accepted(frozenset([str, NONE])) if key.endswith(TEXT_SUFFIXES) else ANYTHING
    if type(value) in (bool, int, float, str):
        kinds = NUMBERS if type(value) is float else {type(value)}
        return Accepted(frozenset(kinds) | ({NONE} if key in NULLABLE else set()))
    if isinstance(value, Mapping):
        return Accepted(frozenset([dict]))
    if isinstance(value, Sequence):
        kinds = frozenset(type(item) for item in value)
        return Accepted(
            frozenset([list]) | (kinds & {str}),
            NUMBERS if kinds and kinds <= NUMBERS else kinds if kinds == {str} else ALL_TYPES,
        )
    return ANYTHING


def by_annotation(annotation: object) -> Accepted:
    """Return the types that an annotation allows."""
    kind = typing.get_origin(annotation) or annotation
    if kind in (typing.Union, types.UnionType):
        return functools.reduce(join, map(by_annotation, typing.get_args(annotation)))
    if kind is None or kind is NONE:
        return Accepted(frozenset([NONE]))
    if not isinstance(kind, type) or kind in (object, Any, collections.abc.Callable):
        return ANYTHING
    if kind in (bool, int, str):
        return Accepted(frozenset([kind]))
    if kind is float:
        return Accepted(NUMBERS)
    if issubclass(kind, os.PathLike):
        return Accepted(frozenset([str]))
    if issubclass(kind, (Sequence, collections.abc.Set)):
        arguments = [one for one in typing.get_args(annotation) if one is not Ellipsis]
        items = frozenset().union(*(by_annotation(one).types for one in arguments))
        return Accepted(frozenset([list]), items or ALL_TYPES)
    # A mapping, or an object, which a config describes by `_target_` and its arguments.
    return Accepted(frozenset([dict]))


def join(one: Accepted, other: Accepted) -> Accepted:
    return Accepted(one.types | other.types, one.items | other.items)


def wrong_type(key: str, text: str, accepted: Accepted) -> ConfigError:
    names = TYPE_NAMES | ({list: "a list of numbers"} if accepted.items - {dict} == NUMBERS else {})
    # A whole number is a number, and objects are rarely meant beside other values.
    hidden = {int} if accepted.types >= NUMBERS else set()
    hidden |= {dict} if accepted.types - {dict, NONE} else set()
    kinds = [name for kind, name in names.items() if kind in accepted.types - hidden]
    is_null = text.strip().lower() == "null" and str in accepted.types
    hint = f": for the word, put it in quotes, '{key}=\"null\"'" if is_null else ""
    return ConfigError(f"{key} takes {' or '.join(kinds)}, got {show(text)}{hint}")


def is_called(node: object) -> bool:
    return isinstance(node, DictConfig) and node.get("_target_") is not None


@functools.cache
def arguments_of(target: str | Callable) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the arguments of a callable by name, and whether it accepts any others.

    A class is assumed to pass what its ``__init__`` does not name on to its base.
    """
    try:
        target = locate(target) if isinstance(target, str) else target
        if not inspect.isclass(target):
            return _arguments_of(target)
        names = {}
        for base in target.__mro__:
            if "__init__" in vars(base):
                own, more = _arguments_of(vars(base)["__init__"])
                names = own | names
                if not more:
                    return names, False
        return names, True
    except (ImportError, TypeError, ValueError):
        # It does not exist, or is written in C.
        return {}, True


def _arguments_of(function: Callable) -> tuple[dict[str, inspect.Parameter], bool]:
    function = inspect.unwrap(function)
    try:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
    except NameError:
        # An annotation that only type checkers can read.
        parameters = inspect.signature(function).parameters.values()
    named = {
        parameter.name: parameter
        for parameter in parameters
        if parameter.name != "self"
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    return named, any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def show(text: str) -> str:
    """Return text for one line of a message."""
    text = text if text.strip() and text.isprintable() else repr(text)
    return text if len(text) <= 100 else f"{text[:97]}..."
