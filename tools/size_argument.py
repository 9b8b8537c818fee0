"""The size of an image or a map as an argument of a program."""

import argparse


def parse_size(text: str) -> tuple[int, int]:
    """``HEIGHTxWIDTH`` -> (height, width), for ``add_argument(type=...)``."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"given {text}, accepted is HEIGHTxWIDTH like 800x1066")
    return int(height), int(width)
