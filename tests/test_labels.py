"""Names on pictures and in messages, whatever characters they hold."""

import pytest
from matplotlib.cbook import is_math_text
from PIL import ImageFont

from lite_detr.labels import (
    class_label,
    label,
    matplotlib_label,
    printable,
    shorten,
)

NAMES = {
    "$_a^b$": "$_a^b$",
    "US$_5^$ 100%": "US$_5^$ 100%",
    r"a\$b\$c": r"a\$b\$c",
    "a\nb\tc\0d\u2028e": "a b c d e",
    "\u202ereversed\u200f": "reversed",
    "שלום %s {0}": "שלום %s {0}",
    "\N{GRINNING FACE}": "\N{GRINNING FACE}",
    "\udcff.jpg": "\N{REPLACEMENT CHARACTER}.jpg",
    "x" * 300: "x" * 37 + "...",
    "": "",
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items(), ids=ascii)
def test_a_label_is_one_short_line(name, expected):
    assert label(name) == expected


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_matplotlib_finds_no_formula_and_shows_the_dollars(name):
    text = matplotlib_label(name)
    assert not is_math_text(text) and text.replace(r"\$", "$") == label(name)
    # As Detectron2 puts it together.
    assert not is_math_text(f"{text} 90%")


def test_class_labels_are_numbers_where_there_are_no_names():
    assert class_label(1, ["a", "$"]) == r"\$" and class_label(1, None) == "1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("ä b", "ä b"), ("a\nb", r"a\nb"), ("\udcff", r"\udcff"), ("\0", r"\x00"), (5, "5")],
)
def test_what_is_printed_is_one_line_that_can_be_encoded(text, expected):
    assert printable(text) == expected and printable(text).encode()


def test_captions_lose_their_beginning():
    font = ImageFont.load_default(15)
    assert shorten("a\nlong\nname.jpg", font, 300) == "a long name.jpg"
    cut = shorten("x" * 5000 + "name.jpg", font, 100)
    assert cut.startswith("...") and cut.endswith("name.jpg") and font.getlength(cut) <= 100
