"""The size of an image or a map as an argument of a program."""

import argparse
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "tools"))

from size_argument import parse_size  # noqa: E402


@pytest.mark.parametrize("text, size", [("64x96", (64, 96)), ("1x1", (1, 1))])
def test_height_comes_first(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["64", "64x", "x64", "0x64", "64x0", "-1x5", "64x96x3", "axb", ""])
def test_what_is_accepted_is_said(text):
    with pytest.raises(argparse.ArgumentTypeError, match="HEIGHTxWIDTH"):
        parse_size(text)
