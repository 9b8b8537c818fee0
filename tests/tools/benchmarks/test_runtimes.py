"""The table of all runtimes: how detections are compared, and a small detector in each."""

import pytest
import torch
from programs import TINY

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
import runtimes  # noqa: E402

from lite_detr.analysis.markdown_page import BEGIN, END  # noqa: E402
from lite_detr.modeling.postprocessing import Detections  # noqa: E402


def detections(*rows):
    """Of (score, class, left), each 10 pixels wide and high."""
    boxes = [[left, 0.0, left + 10, 10.0] for _, _, left in rows]
    scores, classes = (torch.tensor([row[i] for row in rows]) for i in range(2))
    return Detections(torch.tensor(boxes), scores, classes)


ONE = detections((0.9, 0, 0.0), (0.5, 1, 30.0), (0.2, 1, 60.0), (0.001, 2, 0.0))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (ONE, (0.0, 0.0, 0)),
        # The same in another order, as ranks that change places.
        (Detections(*(values[[1, 0, 2, 3]] for values in ONE)), (0.0, 0.0, 0)),
        (
            detections((0.9, 0, 0.25), (0.48, 1, 30.0), (0.2, 1, 60.0), (0.001, 2, 9.0)),
            (0.02, 0.25, 1),
        ),
        (detections((0.9, 0, 0.0), (0.5, 1, 30.0), (0.2, 1, 64.0), (0.001, 2, 0.0)), (0.0, 4.0, 1)),
        (
            detections((0.9, 0, 0.0), (0.5, 1, 30.0), (0.2, 2, 60.0), (0.001, 2, 0.0)),
            (1.0, float("inf"), 2),
        ),
    ],
)
def test_detections_are_compared_with_their_counterparts(other, expected):
    found = runtimes.compare(ONE, other, 0.05)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_a_row_for_each_runtime_is_written_into_a_page(tmp_path):
    pytest.importorskip("openvino")
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n{BEGIN}\n{END}\n")
    options = ["--size", "96x128", "--rounds", "1", "--threads", "1", "--markdown", str(page)]
    runtimes.main(["--config-file", str(TINY), *options])
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    assert [row[0].removeprefix("| ") for row in rows[2:]] == list(runtimes.RUNTIMES)
    exact = [row for row in rows if row[0] in ("| ONNX Runtime", "| OpenVINO, f32")]
    assert len(exact) == 2 and all(float(row[4]) < 1e-4 for row in exact)
