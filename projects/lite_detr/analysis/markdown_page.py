"""Pages of the documentation whose tables a program writes."""

import argparse
from pathlib import Path

# The markers between which the tables stand.
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def page(text: str) -> Path:
    """Argument type: a page with the markers, so that it is refused before the figures are made."""
    try:
        replace_tables(Path(text).read_text(), "")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def write_tables(page: Path, tables: str) -> None:
    """Replace the tables of a page, in place."""
    page.write_text(replace_tables(page.read_text(), tables))


def replace_tables(text: str, tables: str) -> str:
    """Put tables between the markers of a markdown text.

    Raises:
        ValueError: the text lacks the markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the markdown file must hold the lines {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"
