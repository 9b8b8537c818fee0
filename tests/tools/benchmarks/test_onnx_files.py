"""The benchmark of exported detectors, on a small one."""

import onnx_files
import pytest
from programs import TINY

from lite_detr import model_zoo
from lite_detr.analysis.markdown_page import BEGIN, END
from lite_detr.errors import MissingFileError


@pytest.mark.slow
def test_a_table_is_written_into_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n{BEGIN}\n{END}\n")
    options = ["--size", "96x128", "--rounds", "1", "--threads", "1", "--markdown", str(page)]
    onnx_files.main(["--config-file", str(TINY), *options])
    text = page.read_text()
    assert f"| `{TINY}` | " in text and "An image of 96x128, 1 threads" in text


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(MissingFileError, match="holds no image that can be read"):
        onnx_files.read_images(tmp_path, model_zoo.get_config(str(TINY)))
