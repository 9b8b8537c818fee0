"""The demo's contact sheet; that of a run is in test_demo.py."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import contact_sheet as sheets  # noqa: E402


def test_contact_sheet_of_many(tmp_path):
    path = tmp_path / f"{'long_' * 30}name.png"
    Image.new("L", (500, 20), 255).save(path)
    sheet = sheets.contact_sheet([path] * 30)
    width, height = (sheets.TILE_SIDE + sheets.GAP, sheets.TILE_SIDE + sheets.CAPTION_HEIGHT)
    assert sheet.size == (6 * width + sheets.GAP, 4 * (height + sheets.GAP) + sheets.GAP)
    gaps = np.asarray(sheet)[:, sheets.GAP + sheets.TILE_SIDE :: width]
    assert (gaps == 255).all(), "a name leaves its tile"
    with pytest.raises(ValueError, match="at least one picture"):
        sheets.contact_sheet([])
