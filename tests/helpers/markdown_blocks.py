"""The code of markdown pages, fenced and inline, read as MkDocs and GitHub read it."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>[^`]*)$")
TITLE = re.compile(r'\btitle="([^"]*)"')
SPAN = re.compile(r"`([^`]+)`")


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        language: the first word behind the fence, such as ``bash``; empty where there is none.
        title: of ``title="..."`` behind it; empty where there is none.
        text: what is fenced, without the fence's own indentation.
        line: of the opening fence, from 1; the text begins on the next.
    """

    language: str
    title: str
    text: str
    line: int


def pages() -> list[Path]:
    """Those of the root that readers are sent to, and all of ``docs/``."""
    root = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
    return [*filter(Path.is_file, root), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a page, in order.

    Raises:
        ValueError: one is not closed.
    """
    return parse(path.read_text(), str(path))


def parse(text: str, name: str) -> list[Block]:
    """As :func:`blocks`, of a page's text; ``name`` is what errors call it."""
    found, opened, lines = [], None, []
    for number, line in enumerate(text.splitlines(), start=1):
        match = FENCE.match(line)
        if opened is None:
            if match:
                opened, lines = (number, match), []
            continue
        start, opening = opened
        indent, fence = len(opening["indent"]), opening["fence"]
        if match and match["fence"].startswith(fence) and not match["info"].strip():
            info = opening["info"].strip()
            title = TITLE.search(info)
            found.append(
                Block(
                    language=info.split(" ", 1)[0],
                    title=title[1] if title else "",
                    text="".join(f"{line}\n" for line in lines),
                    line=start,
                )
            )
            opened = None
        else:
            # Of a block in a list, as deep as the fence itself.
            lines.append(line[min(indent, len(line) - len(line.lstrip(" "))) :])
    if opened is not None:
        raise ValueError(f"{name}:{opened[0]}: this block is never closed")
    return found


def spans(text: str) -> list[tuple[str, int]]:
    """The inline code of a page's text outside of its blocks, each with its line, from 1."""
    fenced = set()
    for block in parse(text, "page"):
        fenced |= set(range(block.line, block.line + block.text.count("\n") + 2))
    return [
        (span, number)
        for number, line in enumerate(text.splitlines(), start=1)
        if number not in fenced
        for span in SPAN.findall(line)
    ]
