"""Pages of the documentation whose tables a program writes."""

import argparse

import pytest
from programs import ROOT

from lite_detr.analysis.markdown_page import BEGIN, END, page, replace_tables, write_tables


def test_tables_are_replaced_and_the_text_around_them_stays(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for tables in ("| new |", "| new |", "| other |"):
        write_tables(page(str(file)), tables)
        assert file.read_text() == f"before\n{BEGIN}\n\n{tables}\n\n{END}\nafter\n"


@pytest.mark.parametrize("text", [BEGIN, END, f"{END}\n{BEGIN}", "text"])
def test_both_markers_are_needed(tmp_path, text):
    with pytest.raises(ValueError, match="tables: begin.*tables: end"):
        replace_tables(text, "tables")
    file = tmp_path / "page.md"
    file.write_text(text)
    with pytest.raises(argparse.ArgumentTypeError, match="tables: begin.*tables: end"):
        page(str(file))


def test_a_page_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(argparse.ArgumentTypeError, match="No such file.*none.md"):
        page(str(tmp_path / "none.md"))


PAGES = ("docs/MODEL_ZOO.md", "docs/backbones.md", "docs/deploy.md", "kernels/report.md")


@pytest.mark.parametrize("name", PAGES)
def test_pages_of_the_documentation_have_the_markers(name):
    page(str(ROOT / name))
