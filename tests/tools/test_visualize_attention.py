"""The pictures of attention show what the model did, on a tiny detector with random weights."""

import importlib.util

import matplotlib
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from PIL import Image
from programs import ROOT, TINY

from lite_detr import model_zoo
from lite_detr.analysis import figures
from lite_detr.analysis.attention_maps import Samples, record_attention

PLAIN = """
from lite_detr import model_zoo
from lite_detr.analysis import figures
from lite_detr.modeling import MultiScaleDeformableAttention

_base = model_zoo.get_config({tiny!r})
data, dataloader, model, train = (_base[name] for name in ("data", "dataloader", "model", "train"))
model.encoder.layer.attention._target_ = MultiScaleDeformableAttention
"""


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        path = ROOT / "tools" / "visualize_attention.py"
        spec = importlib.util.spec_from_file_location("visualize_attention", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two configs with their weights, and two images."""
    folder = tmp_path_factory.mktemp("attention")
    (folder / "plain.py").write_text(PLAIN.format(tiny=str(TINY)))
    for name, config in {"key_aware": TINY, "plain": folder / "plain.py"}.items():
        torch.manual_seed(0)
        model = instantiate(model_zoo.get_config(str(config)).model)
        torch.save({"model": model.state_dict()}, folder / f"{name}.pth")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for name, (width, height) in {"a.jpg": (96, 64), "b.jpg": (72, 80)}.items():
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
    return folder


@pytest.fixture
def arguments(folder, tmp_path):
    def make(*more, config=TINY, weights="key_aware.pth", images=("images/a.jpg",)):
        given = ["--config-file", config, "--weights", folder / weights]
        given += ["--output", tmp_path / "out", *more]
        return list(map(str, [*given, "--input", *(folder / image for image in images)]))

    return make


@pytest.fixture
def watcher(tool, arguments):
    (made,) = tool.make_watchers(tool.parse_args(arguments()))
    return made


def test_an_image_becomes_a_png_and_a_pdf_with_a_row_for_each_model(
    tool, arguments, folder, tmp_path, capsys
):
    more = ["--config-file", folder / "plain.py", "--weights", folder / "plain.pth"]
    assert tool.main(arguments(*more)) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.pdf", "a.png"]
    assert capsys.readouterr().out == f"figures: 1, failures: 0; they are in {tmp_path / 'out'}\n"
    with Image.open(tmp_path / "out" / "a.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    half = len(pixels) // 2
    assert pixels[:half].std() > 10 and pixels[half:].std() > 10
    assert (tmp_path / "out" / "a.pdf").read_bytes().startswith(b"%PDF")


def test_titles_tell_key_aware_attention_from_plain(tool, arguments, folder):
    more = ["--config-file", folder / "plain.py", "--weights", folder / "plain.pth"]
    key_aware, plain = tool.make_watchers(tool.parse_args(arguments(*more, "--part", "decoder")))
    assert key_aware.title == "tiny, key_aware: key-aware attention, decoder.layers.1.cross_attn"
    assert plain.title == "plain, plain: plain attention, decoder.layers.1.cross_attn"


def test_the_layer_is_the_last_one_unless_it_is_given(tool, watcher):
    model = watcher.detector.model
    assert watcher.attention == "encoder.layers.1.self_attn"
    assert tool.choose_attention(model, "encoder", 0) == "encoder.layers.0.self_attn"


def test_samples_are_those_of_the_forward_pass(watcher, folder):
    _, inputs = watcher.detector.read(folder / "images" / "a.jpg")
    attention, instances = watcher.look(inputs)
    row = watcher.row(attention, instances, (0.4, 0.6))
    with record_attention(watcher.detector.model) as maps, torch.no_grad():
        watcher.detector.model([inputs])
    expected = next(record for record in maps if record.name == "encoder.layers.1.self_attn")
    one, fine, coarse = row.panels
    # The cell of the 8 x 12 map in which the point lies.
    query = 4 * 12 + 4
    assert one.query == pytest.approx((4.5 / 12, 4.5 / 8))
    found = expected.strongest(100, query=query)
    assert one.samples.weights.tolist() == found.weights.tolist()
    assert one.title == f"(a) one query, of S3: top {len(found.weights)} on all scales"
    for level, panel in enumerate((fine, coarse)):
        found = expected.strongest(200, level=level)
        assert panel.samples.points.tolist() == found.points.tolist()
        assert len(found.weights) == 200 and panel.query is None
    assert fine.title == "(b) all queries: top 200 on S3"


def test_the_query_is_at_the_best_detection_unless_it_is_given(tool, watcher, folder, monkeypatch):
    points = []
    monkeypatch.setattr(tool, "draw_attention", lambda *_: None)
    monkeypatch.setattr(watcher, "row", lambda *arguments: points.append(arguments[2]))
    path = folder / "images" / "a.jpg"
    tool.draw_image([watcher], path, None)
    tool.draw_image([watcher], path, (24.0, 48.0))
    _, instances = watcher.look(watcher.detector.read(path)[1])
    x, y = instances.pred_boxes.get_centers()[instances.scores.argmax()].tolist()
    assert points == [pytest.approx((x / 96, y / 64)), (0.25, 0.75)]


def test_only_detections_that_reach_the_threshold_are_drawn(watcher, folder):
    attention, instances = watcher.look(watcher.detector.read(folder / "images" / "a.jpg")[1])
    watcher.threshold = instances.scores[2].item()
    row = watcher.row(attention, instances, (0.5, 0.5))
    assert row.instances.scores.tolist() == instances.scores[:3].tolist()


def test_markers_tell_scales_and_colours_weights():
    samples = Samples(
        torch.tensor([[0.5, 0.25], [0.1, 0.2], [0.9, 0.8]]),
        torch.tensor([0.8, 0.5, 0.2]),
        torch.tensor([1, 0, 1]),
    )
    instances = Instances((40, 60))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 5.0, 30.0, 20.0]]))
    instances.scores, instances.pred_classes = torch.tensor([0.9]), torch.tensor([2])
    panels = [figures.Panel("samples", samples, query=(0.5, 0.5))]
    row = figures.ModelRow("model", instances, [8, 16], panels)
    figure = figures.draw_attention(np.zeros((40, 60, 3), np.uint8), [row], None)
    (part,) = figure.subfigs
    axis = part.axes[0]
    coarse, fine = axis.collections[:2]
    assert coarse.get_offsets().data == pytest.approx(np.array([[54, 32], [30, 10]]), abs=1e-4)
    assert fine.get_offsets().data == pytest.approx(np.array([[6, 8]]), abs=1e-4)
    assert not np.array_equal(coarse.get_paths()[0].vertices, fine.get_paths()[0].vertices)
    colours = matplotlib.colormaps[figures.COLOUR_MAP]
    assert tuple(coarse.get_facecolors()[0]) == pytest.approx(colours(0.0))
    assert tuple(coarse.get_facecolors()[1]) == pytest.approx(colours(1.0))
    box = axis.lines[0]
    assert box.get_xydata().tolist() == [[10, 5], [30, 5], [30, 20], [10, 20], [10, 5]]
    labels = [text.get_text() for text in part.legends[0].get_texts()]
    assert labels == ["S3 (stride 8)", "S4 (stride 16)", "class 2", "query"]


def test_a_legend_of_many_classes_is_wrapped():
    classes = torch.arange(20)
    instances = Instances((40, 60), pred_boxes=Boxes(torch.zeros(20, 4)), pred_classes=classes)
    nothing = Samples(torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    row = figures.ModelRow("model", instances, [8], [figures.Panel("one", nothing)])
    figure = figures.draw_attention(np.zeros((40, 60, 3), np.uint8), [row], None)
    (part,) = figure.subfigs
    (legend,) = part.legends
    figure.draw_without_rendering()
    texts = legend.get_texts()
    lines = {round(text.get_window_extent().y0) for text in texts}
    assert 1 < len(lines) < 21 and len(texts) == 21
    assert legend.get_window_extent().width <= part.bbox.width
    assert len({line.get_color() for line in legend.get_lines()[:20]}) == 20


def test_a_panel_without_samples_is_drawn():
    empty = Samples(torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    instances = Instances((40, 60), pred_boxes=Boxes(torch.zeros(0, 4)))
    instances.pred_classes = torch.zeros(0, dtype=torch.int64)
    row = figures.ModelRow("model", instances, [8], [figures.Panel("nothing", empty)])
    figure = figures.draw_attention(np.zeros((40, 60, 3), np.uint8), [row], None)
    assert not figure.subfigs[0].axes[0].collections


def test_what_cannot_be_drawn_is_named_and_skipped(tool, arguments, folder, capsys):
    (folder / "images" / "broken.jpg").write_text("no image")
    images = ["images/a.jpg", "images/broken.jpg", "images/absent.jpg"]
    assert tool.main(arguments("--query", "96.5,10", images=images)) == 1
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if "skipped" in line]
    assert lines[0] == f"{folder / 'images/absent.jpg'}: skipped, as it names no image"
    assert lines[1].endswith("a.jpg: skipped: query 96.5,10 is outside its 96 x 64 pixels")
    assert "broken.jpg: skipped: unreadable image: " in lines[2]
    assert "figures: 0, failures: 3;" in output.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": "absent.py"}, "config 'absent.py' is neither a file nor"),
        ({"weights": "absent.pth"}, "absent.pth: there is no such file"),
        ({"more": ["--layer", 2]}, "the encoder has no layer 2; --layer takes 0 to 1"),
        ({"more": ["--strides", 4, 8]}, "no scale of stride 4; it has 8, 16, 32, 64: give two"),
    ],
)
def test_errors_are_one_line(tool, arguments, capsys, change, message):
    more = change.pop("more", [])
    with pytest.raises(SystemExit) as exit_info:
        tool.main(arguments(*more, **change))
    assert exit_info.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--query", "middle"], "given middle, accepted is X,Y like 320,240"),
        (["--config-file", "a", "--config-file", "b"], "a figure has one row or two, not 3"),
        (["--config-file", "plain.py"], "2 config files, but 1 weights: give --weights for each"),
        (["--part", "neck"], "invalid choice: 'neck'"),
    ],
)
def test_bad_arguments(tool, arguments, capsys, more, message):
    with pytest.raises(SystemExit) as exit_info:
        tool.main(arguments(*more))
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_one_config_may_have_two_weights(tool, arguments, folder):
    args = tool.parse_args(arguments("--weights", folder / "plain.pth"))
    assert args.config_file == [str(TINY)] * 2
