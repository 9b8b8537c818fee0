"""Names of classes and files as text on pictures and in messages, whatever characters they hold.

Names come from annotation files, ONNX files and file systems: they may hold formulas of Matplotlib
(``$x^2$``), line breaks, bytes that are not text, marks that reverse a line, or 300 characters.
"""

import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Programs answer wrong arguments without it.
    from PIL import ImageFont

# In characters: longer labels would cover the picture.
MAX_LABEL = 40


def printable(text: object) -> str:
    """Return a text on one line that any terminal, log and JSON file takes.

    Characters that cannot be printed are written as Python writes them, such as ``\\n``, ``\\x00``
    and ``\\udcff``, the last of which is a byte that is not UTF-8 in the name of a file.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def first_line(text: object, limit: int = 200) -> str:
    """Return the first line of a text, printable and shortened to ``limit``.

    Of an error without a text, it is the name of its class.
    """
    name = type(text).__name__ if isinstance(text, BaseException) else ""
    line = next(iter(str(text).strip().splitlines()), name)
    return printable(line) if len(line) <= limit else f"{printable(line[:limit])}..."


def label(text: object, limit: int = MAX_LABEL) -> str:
    """Return a name as one line of text to draw on a picture.

    Control characters and marks of writing direction become spaces or disappear, bytes that are
    not text become a replacement character, and a long name is cut at its end.

    Args:
        text: the name.
        limit: the largest number of characters.
    """
    kept = []
    for character in str(text):
        category = unicodedata.category(character)
        if category in ("Cc", "Zl", "Zp"):
            kept.append(" ")
        elif category == "Cs":
            kept.append("\N{REPLACEMENT CHARACTER}")
        elif category != "Cf":
            kept.append(character)
    line = " ".join("".join(kept).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def matplotlib_label(text: object, limit: int = MAX_LABEL) -> str:
    """Return :func:`label` for Matplotlib, which takes what is between two dollars for a formula.

    With every dollar escaped it finds no formula, and shows the dollars as they are.
    """
    return label(text, limit).replace("$", r"\$")


@contextmanager
def missing_glyphs() -> Iterator[None]:
    """Draw empty squares for characters that Matplotlib's font lacks, without its warnings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def class_label(number: int, names: Sequence[str] | None) -> str:
    """Return the label of a class for Matplotlib; its number if the names are unknown."""
    return matplotlib_label(names[number]) if names else str(number)


def shorten(text: object, font: "ImageFont.FreeTypeFont", width: int) -> str:
    """Return a label cut at its beginning to a width: names often differ at the end.

    Args:
        text: the name.
        font: the one that draws it.
        width: in pixels.
    """
    line = label(str(text)[-1000:], limit=1000)
    kept = line
    while line and font.getlength(kept) > width:
        line = line[1:]
        kept = f"...{line}"
    return kept
