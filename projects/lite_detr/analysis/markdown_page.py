"""Pages of the documentation whose tables a program writes."""

# The markers between which the tables stand.
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def replace_tables(text: str, tables: str) -> str:
    """Puts tables between the markers of a markdown text.

    Raises:
        ValueError: the text lacks the markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the markdown file must hold the lines {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"
