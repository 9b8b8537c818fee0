"""The page to play with, on a tiny detector with random weights; slow tests use a browser."""

import itertools
import re
import shutil
import types
import urllib.error
import urllib.request
from unittest import mock

import app
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image
from programs import TINY

from lite_detr import model_zoo
from lite_detr.analysis import explorer as explorers
from lite_detr.errors import ImageError, MissingFileError
from lite_detr.inference.predictor import load_trained_config

ENCODER = "Encoder, layer 2 of 2 · key-aware"
DECODER = "Decoder, layer 2 of 2 · key-aware"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights and an image."""
    folder = tmp_path_factory.mktemp("app")
    torch.manual_seed(0)
    model = instantiate(model_zoo.get_config(str(TINY)).model)
    with torch.no_grad():
        # None looks at all points alike, as attention that is not trained does.
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    torch.save({"model": model.state_dict()}, folder / "tiny.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    return folder


@pytest.fixture(scope="module")
def explorer(folder):
    return explorers.Explorer(load_trained_config(str(TINY), str(folder / "tiny.pth")))


@pytest.fixture(scope="module")
def view(explorer, folder):
    return explorer.view(folder / "a.png")


def test_each_detection_is_of_the_query_that_made_it(explorer, view):
    raw = explorer.detector.model.forward_queries([view.inputs])
    scores = raw["pred_logits"][0].sigmoid()[view.queries, view.instances.pred_classes]
    torch.testing.assert_close(scores, view.instances.scores)
    assert len(view.queries.unique()) > 1
    assert view.image.shape == (640, 960, 3) and view.instances.image_size == (640, 960)


def test_a_click_finds_the_smallest_object_around_it():
    boxes = torch.tensor([[0.0, 0, 90, 90], [10, 10, 30, 30], [20, 20, 80, 80]])
    found = [explorers.find_detection(boxes, point) for point in ((25, 25), (85, 5), (95, 95))]
    assert found == [1, 0, None]
    assert explorers.find_detection(boxes[:0], (1, 1)) is None


def test_the_query_is_the_token_at_a_click_or_that_of_the_object(explorer, view):
    boxes = view.instances.pred_boxes.tensor
    nearest_query = explorer.attention(view, DECODER).nearest_query
    # Middles of the cells of the 8 x 12 map, in an object whose query is not the nearest one.
    for row, column in itertools.product(range(8), range(12)):
        point = ((column + 0.5) / 12, (row + 0.5) / 8)
        found = explorers.find_detection(boxes, (point[0] * 960, point[1] * 640))
        if found is not None and view.queries[found] != nearest_query(point):
            break
    else:
        pytest.fail("no cell has an object whose query is not the nearest one")
    assert explorer.query(view, DECODER, point, 0.0) == view.queries[found]
    # Of objects that are not shown, none is clicked.
    assert explorer.query(view, DECODER, point, 1.0) == nearest_query(point)
    assert explorer.query(view, ENCODER, point, 0.0) == row * 12 + column


@pytest.mark.parametrize("scope", ["one", "all"])
def test_where_a_query_looks_is_shown_on_all_scales_and_on_each(explorer, view, scope):
    query = 10 if scope == "one" else None
    text, pictures = explorer.look(view, ENCODER, query, threshold=0.0)
    assert text == ("A token of ● S3" if scope == "one" else "All 128 queries of this layer")
    captions = [picture.caption for picture in pictures]
    assert captions[0].startswith("all scales · ")
    assert [caption[:4] for caption in captions[1:]] == ["● S3", "■ S4", "▲ S5", "◆ S6"]
    shares = [int(re.search(r"(\d+)%", caption)[1]) for caption in captions[1:]]
    weights = explorer.attention(view, ENCODER).weights[0]
    expected = (weights[10:11] if scope == "one" else weights).sum(-1).mean((0, 1))
    assert shares == [round(100 * share) for share in expected.tolist()]
    assert all(picture.pixels.shape == (320, 480, 3) for picture in pictures)


def test_the_threshold_changes_what_is_drawn_and_runs_no_model(explorer, view, monkeypatch):
    scores = view.instances.scores
    monkeypatch.setattr(explorer.detector.model, "encode", None)
    everything, count = explorer.draw(view, 0.0)
    assert count == len(scores)
    few, count = explorer.draw(view, scores[2].item())
    assert count == 3 and (few != everything).any()
    nothing, count = explorer.draw(view, 1.0)
    assert count == 0 and (nothing == view.image).all()


def test_layers_update_the_scales_of_the_papers_encoder(explorer, view):
    assert explorer.title == "DeformableDETR with H3L1-(2+1)x1, key-aware"
    assert explorer.layers == [(1, 2, 3), (0, 1, 2, 3)]
    captions = [picture.caption for picture in explorer.draw_grids(view)]
    assert captions[0] == "S3, stride 8: 96 tokens" and len(captions) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("large.png", "file too large: it has 0.0 MB, accepted are 4.76837e-05: save it smaller"),
        ("wide.png", "image of too many pixels: it has 60 x 50, accepted are 0.002 million"),
        ("broken.png", "unreadable image: not an image of the formats"),
        ("cut.png", "unreadable image: "),
    ],
)
def test_files_of_any_kind_are_refused_before_they_cost_anything(
    tmp_path, monkeypatch, name, message
):
    path = tmp_path / name
    Image.new("1", (60, 50)).save(path)
    if name == "broken.png":
        path.write_text("no image")
    if name == "cut.png":
        path.write_bytes(path.read_bytes()[:20])
    if name == "large.png":
        monkeypatch.setattr(explorers, "MAX_BYTES", 50)
    if name == "wide.png":
        monkeypatch.setattr(explorers, "MAX_PIXELS", 2000)
    with pytest.raises(ImageError, match=re.escape(message)):
        explorers.check_upload(path)


def test_without_a_trained_detector_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match="output/demo/model_final.pth, is not trained yet"):
        app.choose_detectors(app.parse_args([]))


def test_a_second_detector_stands_beside_the_demos_or_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = app.parse_args(["--weights", "a.pth", "--compare", "b.py", "b.pth"])
    assert app.choose_detectors(given) == [(app.DEMO_CONFIG, "a.pth"), ("b.py", "b.pth")]
    given = app.parse_args(["--config-file", "c.py"])
    assert app.choose_detectors(given) == [("c.py", None)]


def test_without_gradio_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(app, "importlib", types.SimpleNamespace(util=types.SimpleNamespace()))
    app.importlib.util.find_spec = lambda name: None
    with pytest.raises(SystemExit):
        app.main([])
    assert capsys.readouterr().err.startswith("error: the page needs Gradio: `make app` installs")


def test_only_this_machine_is_served_unless_it_is_asked_for():
    assert app.parse_args([]).host == "127.0.0.1"
    assert app.parse_args(["--host", "0.0.0.0", "--port", "80"]).host == "0.0.0.0"


def test_examples_are_usable_images_with_small_thumbnails(folder, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_text("no image")
    found = app.find_examples([str(folder), str(tmp_path), "*.gif"])
    assert {path.name: max(picture.size) for path, picture in found.items()} == {"a.png": 96}
    errors = capsys.readouterr().err
    assert "broken.jpg: skipped: unreadable image" in errors
    assert "*.gif: skipped, as it names no image" in errors


@pytest.fixture(scope="module")
def address(explorer, folder, tmp_path_factory):
    """The page on a free port; its files are in a folder of their own."""
    pytest.importorskip("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        from app_page import Page

        blocks = Page([explorer, explorer], app.find_examples([str(folder)])).build()
        yield app.serve(blocks, "127.0.0.1", None)
        blocks.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page with its example, in a new window; nothing may go wrong in it."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    page.errors, page.addresses = [], []

    def hear(said):
        # Gradio's page asks how far an upload is, also if it has already ended.
        asked = "upload_progress" in said.location["url"] or said.text == "Response"
        if said.type == "error" and not asked:
            page.errors.append(said.text)

    page.on("console", hear)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda request: page.addresses.append(request.url))
    page.goto(address)
    status(page, "a.png: ")
    page.wait_for_selector(".look figure")
    yield page
    assert page.errors == []
    context.close()


def status(page, start):
    """Wait until the status begins so, and return it."""
    page.wait_for_function(
        "start => document.querySelector('#status .notice')?.innerText.startsWith(start)",
        arg=start,
    )
    return page.inner_text("#status .notice")


def picture(page):
    return page.get_attribute("#picture img", "src")


def upload(page, path):
    page.set_input_files("input[type=file]", path)


@pytest.mark.slow
def test_the_browser_fetches_nothing_from_elsewhere(page, address):
    kinds = (address, "data:", "blob:")
    assert len(page.addresses) > 5
    assert [url for url in page.addresses if not url.startswith(kinds)] == []
    policy = page.request.get(address).headers["content-security-policy"]
    assert policy.startswith("default-src 'self' data: blob: ")
    page.evaluate("fetch('http://127.0.0.1:1/').catch(() => 0)")
    assert all("Content Security Policy" in error for error in page.errors) and page.errors
    page.errors.clear()


@pytest.mark.slow
def test_an_uploaded_image_is_shown_and_another_can_follow(page, tmp_path):
    for name, size in {"wide <b>.png": (90, 30), "high.jpg": (30, 90)}.items():
        Image.new("RGB", size, "red").save(tmp_path / name)
        before = picture(page)
        upload(page, tmp_path / name)
        status(page, name.split()[0])
        page.wait_for_function(
            "old => (i => i.src != old && i.complete && i.naturalWidth)"
            "(document.querySelector('#picture img'))",
            arg=before,
        )
        shape = page.eval_on_selector("#picture img", "i => i.naturalWidth / i.naturalHeight")
        assert shape == pytest.approx(size[0] / size[1], rel=0.01)
        page.wait_for_selector("text=Drop File Here")


@pytest.mark.slow
def test_the_slider_runs_no_model(page, explorer, monkeypatch):
    text, before = page.inner_text("#status .notice"), picture(page)
    monkeypatch.setattr(explorer.detector.model, "encode", None)
    number = page.get_by_label("number input for Lowest score shown")
    number.fill("0.01")
    number.press("Enter")
    page.wait_for_function("old => document.querySelector('#picture img').src != old", arg=before)
    assert "with a score of 1% or more" in status(page, "a.png: ") != text


@pytest.mark.slow
def test_a_click_moves_the_query(page, explorer):
    before = page.get_attribute(".look figure img", "src")
    box = page.locator("#picture img").bounding_box()
    with mock.patch.object(explorer, "query", wraps=explorer.query) as query:
        page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 0.75 * box["height"])
        page.wait_for_function(
            "old => document.querySelector('.look figure img').src != old", arg=before
        )
    assert query.call_args.args[2] == pytest.approx((0.25, 0.75), abs=0.005)
    assert page.inner_text(".look p >> nth=0") == "A token of ● S3"
    page.get_by_label("DeformableDETR with").first.click()
    page.get_by_role("option", name=DECODER).click()
    page.wait_for_selector("text=Object query")
    page.get_by_label("all", exact=True).check()
    page.wait_for_selector("text=All 10 queries of this layer")


@pytest.mark.slow
def test_tokens_and_both_detectors_with_their_times_are_shown(page):
    page.get_by_role("tab", name="Tokens").click()
    assert page.inner_text("#tokens .bars").split("\n")[:2] == ["Layer 1", "25% of the tokens"]
    page.get_by_role("tab", name="Full and lite").click()
    assert page.locator("#compared figure").count() == 2
    page.get_by_role("button", name="Measure").click()
    page.wait_for_selector("#times tr >> nth=1")
    assert re.search(r" ms\s1.00 ×", page.inner_text("#times"))


@pytest.mark.slow
def test_a_file_that_cannot_be_shown_is_named_and_the_page_stays(page, folder, tmp_path):
    before = picture(page)
    (tmp_path / "text.jpg").write_text("no image")
    whole = (folder / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (10_000, 5_001)).save(tmp_path / "huge.png")
    (tmp_path / "heavy.png").write_bytes(bytes(explorers.MAX_BYTES + 2**20))
    for name, reason in {
        "text.jpg": "unreadable image: not an image of the formats",
        "cut.png": "unreadable image: ",
        "huge.png": "image of too many pixels: it has 10000 x 5001, accepted are 50 million",
        "heavy.png": "file too large: it has 21.0 MB, accepted are 20: save it smaller",
    }.items():
        upload(page, tmp_path / name)
        assert f"{name} cannot be shown: {reason}" in status(page, name)
        assert picture(page) == before


@pytest.mark.slow
def test_the_server_stops_reading_what_no_image_can_be(address):
    """Python's own client, as a browser's page refuses to send it."""
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body += bytes(app.MAX_UPLOAD * explorers.MAX_BYTES + 1) + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address}gradio_api/upload", body, headers)
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(request, timeout=60)
