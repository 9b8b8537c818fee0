"""Pages of the documentation whose tables a program writes."""

import pytest
from programs import ROOT

from lite_detr.analysis.markdown_page import BEGIN, END, replace_tables


def test_tables_are_replaced_and_the_text_around_them_stays():
    replaced = replace_tables(f"before\n{BEGIN}\nold\n{END}\nafter\n", "| new |")
    assert replaced == f"before\n{BEGIN}\n\n| new |\n\n{END}\nafter\n"
    assert replace_tables(replaced, "| new |") == replaced
    other = replace_tables(replaced, "| other |")
    assert "other" in other
    assert "new" not in other


@pytest.mark.parametrize("text", [BEGIN, END, f"{END}\n{BEGIN}", "text"])
def test_both_markers_are_needed(text):
    with pytest.raises(ValueError, match="tables: begin.*tables: end"):
        replace_tables(text, "tables")


@pytest.mark.parametrize("page", ["docs/MODEL_ZOO.md", "docs/backbones.md", "kernels/report.md"])
def test_markers_stand_in_the_documentation(page):
    replace_tables((ROOT / page).read_text(), "")
