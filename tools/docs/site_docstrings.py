"""Adapts docstrings, which are written for readers of the code, to the documentation's site.

An extension of Griffe, which reads docstrings for mkdocstrings (``extensions`` in mkdocs.yml):
``:class:`Name``` becomes a link to ``Name``, and arguments that are described together, as in
``height, width: in pixels``, are listed each by itself, with its type and default.
"""

import re
from collections.abc import Iterator

from griffe import Extension, Module, NameResolutionError, Object, get_logger

logger = get_logger(__name__)

ROLE = re.compile(r":(?:class|data|func|meth|mod):`(?P<name>[\w.]+)`")
# A line "    one, other: text", and those of the text that follow, which are indented further.
TOGETHER = re.compile(
    r"^(?P<indent> +)(?P<names>\**\w+(?:, \**\w+)+): (?P<text>.*(?:\n(?P=indent) +.*)*)", re.M
)


class SiteDocstrings(Extension):
    """Rewrites the docstrings of a package when all of it has been read."""

    def on_package(self, *, pkg: Module, **kwargs) -> None:
        rewrite(pkg)


def rewrite(place: Object) -> None:
    """Rewrite the docstrings of an object, and of all that is defined in it."""
    if place.docstring:
        text = TOGETHER.sub(lambda match: split_arguments(match, place), place.docstring.value)
        place.docstring.value = ROLE.sub(lambda match: link(match["name"], place), text)
    for member in place.members.values():
        if not member.is_alias:
            rewrite(member)


def split_arguments(together: re.Match, place: Object) -> str:
    """Return an entry for each argument; text that names none is not an entry, and stays."""
    names = together["names"].split(", ")
    known = {parameter.name for parameter in getattr(place, "parameters", ())}
    if not known.issuperset(name.lstrip("*") for name in names):
        return together[0]
    return "\n".join(f"{together['indent']}{name}: {together['text']}" for name in names)


def link(name: str, place: Object) -> str:
    """Return HTML for a name: a link if the site has the object, else code.

    Warns of a name that is defined nowhere, which fails a strict build.
    """
    path = find(name, place)
    package = place.package
    if path is None:
        logger.warning(f"{place.path}: its docstring refers to {name!r}, which nothing defines")
    elif path.split(".")[0] == package.path:
        try:
            path = package.modules_collection[path].canonical_path
        except KeyError:
            logger.warning(f"{place.path}: its docstring refers to {name!r}: there is no {path}")
        return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
    return f"`{name}`"


def find(name: str, place: Object) -> str | None:
    """Return the path of a name in an object's scope, or the only one that the package defines."""
    first, dot, rest = name.partition(".")
    package = place.package
    if first == package.path:
        return name
    try:
        path = place.resolve(first)
    except NameResolutionError:
        defined = [module.path for module in modules(package) if defines(module, first)]
        if len(defined) != 1:
            return None
        path = f"{defined[0]}.{first}"
    return f"{path}{dot}{rest}"


def modules(package: Module) -> Iterator[Module]:
    yield package
    for module in package.modules.values():
        if not module.is_alias:
            yield from modules(module)


def defines(module: Module, name: str) -> bool:
    return name in module.members and not module.members[name].is_alias
