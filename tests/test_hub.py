"""Detectors in safetensors files: in a folder, and on a Hub that this file stands in for."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import convert_checkpoint as tool
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image
from programs import CONFIGS, TINY
from reference_checkpoints import small_two_stage

import lite_detr
from lite_detr import hub, model_zoo
from lite_detr.checkpoint import DetrCheckpointer
from lite_detr.checkpoint.release_file import read_release, write_release
from lite_detr.errors import ConfigError, DownloadError, MissingFileError, WeightsError
from lite_detr.inference.released import from_plain, release_config, release_run

pytest.importorskip("safetensors", reason="needs the safetensors library")
NAMES = ["circle", "square", "$x$"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder, the config and the model of a run that has written its final weights."""
    folder = tmp_path_factory.mktemp("run")
    config = model_zoo.get_config(str(TINY))
    config.model.num_classes = len(NAMES)
    config.train.output_dir = str(folder)
    torch.manual_seed(0)
    model = instantiate(config.model).eval()
    model.class_names = tuple(NAMES)
    DetrCheckpointer(model, str(folder)).save("model_final")
    return folder, config, model


@pytest.fixture(scope="module")
def file(run):
    (path,) = release_run(run[1])
    assert path.name == "model_final.safetensors"
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_a_folder_gives_a_ready_detector(run, file, image, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(file.read_bytes())
    detector = lite_detr.from_pretrained(str(tmp_path), device="cpu")
    assert detector.metadata.thing_classes == NAMES
    (prediction,) = detector.predict_files([image])
    pixels = torch.as_tensor(np.asarray(Image.open(image)).copy()).permute(2, 0, 1)
    with torch.no_grad():
        expected = run[2]([{"image": pixels, "height": 64, "width": 96}])[0]["instances"]
    assert len(expected) and torch.equal(prediction.instances.scores, expected.scores)
    assert torch.equal(prediction.instances.pred_boxes.tensor, expected.pred_boxes.tensor)
    model = hub.load(str(file), device="cpu")
    assert not model.training and model.class_names == tuple(NAMES)
    assert read_release(str(file)).version == lite_detr.__version__


def test_configs_of_the_zoo_can_be_released_and_read():
    for name in model_zoo.list_configs()[::2]:
        config = model_zoo.get_config(name)
        parts = json.loads(json.dumps(release_config(config)))
        assert from_plain(parts["model"], "a file")["_target_"] is config.model["_target_"]
        assert "state_dict" not in parts["model"]["backbone"]
    config = model_zoo.get_config(str(TINY))
    config.model.score_thresh = torch.nn.ReLU()
    with pytest.raises(ConfigError, match="model.score_thresh=ReLU.. cannot be written"):
        release_config(config)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"_target_": "os.system", "command": "touch pwned"}, "calls 'os.system'"),
        ({"_target_": "lite_detr.modeling.dino.torch.load"}, "calls 'lite_detr.modeling.dino.to"),
        ({"_target_": "torch.nn.NoSuchModule"}, "calls 'torch.nn.NoSuchModule'"),
        ({"_target_": ["os.system"]}, "calls .*os.system"),
        ({"_class_": "subprocess.Popen"}, "calls 'subprocess.Popen'"),
        ({"_partial_": "builtins.eval"}, "calls 'builtins.eval'"),
        ("${oc.env:HOME}", "refers to"),
        ({"_target_": "lite_detr.modeling.TimmBackbone", "model_name": "hf-hub:a/b"}, "reads oth"),
        (
            {
                "_target_": "lite_detr.modeling.TimmBackbone",
                "model_name": "resnet18",
                "options": {"checkpoint_path": "a.pth"},
            },
            "reads other files by checkpoint_path",
        ),
    ],
)
def test_a_config_that_could_run_or_read_something_is_refused(part, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"model": {"_target_": "lite_detr.modeling.DINO", "backbone": part}, "mapper": {}}
    write_release("a.safetensors", {"a": torch.zeros(1)}, config)
    with pytest.raises(
        WeightsError, match=f"a.safetensors: their config is refused, as it {words}"
    ):
        hub.load("a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_that_are_no_released_detectors_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_release("a.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(WeightsError, match="a.safetensors hold no config: write them by train_net"):
        hub.load("a.safetensors")
    for config in ({"model": 3}, {}):
        write_release("a.safetensors", {"a": torch.zeros(1)}, config)
        with pytest.raises(WeightsError, match="a.safetensors are broken: their config has no "):
            hub.load("a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"half")
    for name, words in {
        "b.safetensors": "b.safetensors are broken",
        "c.safetensors": "c.safetensors: there is no such file",
        ".": "model.safetensors: there is no such file",
        "no name": "user/name on the Hub",
    }.items():
        with pytest.raises((WeightsError, MissingFileError), match=words):
            hub.load(name)


def test_tensors_that_share_memory_and_tensors_on_a_slice_are_written(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    path = tmp_path / "a.safetensors"
    write_release(path, {"a": base, "b": base, "c": base.T, "d": base[1:]}, class_names=["x"])
    loaded = DetrCheckpointer(torch.nn.Linear(1, 1))._load_file(str(path))
    assert torch.equal(loaded["model"]["c"], base.T) and torch.equal(loaded["model"]["b"], base)
    assert loaded["class_names"] == ["x"]


@pytest.mark.parametrize("own", [True, False])
def test_the_tool_writes_what_all_programs_read(own, run, file, tmp_path):
    output, given = tmp_path / "a.safetensors", tmp_path / "given.pth"
    if own:
        folder, config, model = run
        options = ["--config-file", TINY, "--input", folder / "model_final.pth"]
        options += ["model.num_classes=3"]
    else:
        config = model_zoo.get_config(str(CONFIGS / "small_two_stage.py"))
        torch.save(small_two_stage(91), given)
        options = ["--config-file", CONFIGS / "small_two_stage.py", "--input", given]
        model = instantiate(config.model)
    tool.main([str(option) for option in [*options, "--output", output]])
    DetrCheckpointer(model).load(str(output))
    names = read_release(str(output)).class_names
    assert names == NAMES if own else (len(names) == 80 and names[0] == "person")
    loaded = hub.load(str(output), device="cpu").state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())


class Hub(BaseHTTPRequestHandler):
    """Keeps what is committed to it, with the requests of huggingface_hub."""

    files: dict[str, bytes] = {}

    def answer(self, content=b"{}", status=200, **headers):
        self.send_response(status)
        headers = {"Content-Length": len(content)} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
            ]
            self.answer(json.dumps({"files": files}).encode())
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[entry["value"]["path"]] = content
            url = f"http://{self.headers['Host']}/user/shapes/commit/{'1' * 40}"
            self.answer(json.dumps({"commitUrl": url, "commitOid": "1" * 40}).encode())
        else:
            url = f"http://{self.headers['Host']}/user/shapes"
            self.answer(json.dumps({"url": url, "id": "user/shapes"}).encode())

    def do_GET(self):
        name = self.path.partition("/resolve/main/")[2] or self.path.rpartition("/")[2]
        content = self.files.get(name) if self.path.startswith("/user/shapes/") else None
        if content is None:
            self.answer(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit="1" * 40)
        else:
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.answer(content, ETag=etag, X_Repo_Commit="1" * 40)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs the extra hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Hub, "files", {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_detector_goes_to_the_hub_and_comes_back(run, file, endpoint):
    address = hub.push(file, "user/shapes", endpoint=endpoint)
    assert address == f"{endpoint}/user/shapes"
    assert Hub.files["model.safetensors"] == file.read_bytes()
    page = Hub.files["README.md"].decode()
    assert "A DeformableDETR detector" in page and "Classes: circle, square, $x$." in page
    detector = lite_detr.from_pretrained("user/shapes", endpoint=endpoint, device="cpu")
    weights = detector.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in run[2].state_dict().items())
    Hub.files["README.md"] = b"mine"
    hub.push(file, "user/shapes", endpoint=endpoint)
    assert Hub.files["README.md"] == b"mine"
    with pytest.raises(DownloadError, match="weights user/other cannot be downloaded"):
        hub.load("user/other", endpoint=endpoint)


def test_only_what_others_can_load_is_uploaded(endpoint, tmp_path):
    path = tmp_path / "a.safetensors"
    write_release(path, {"a": torch.zeros(1)}, {"model": {"_target_": "mine.Model"}, "mapper": {}})
    with pytest.raises(WeightsError, match="calls 'mine.Model'"):
        hub.push(path, "user/shapes", endpoint=endpoint)
    assert Hub.files == {}
