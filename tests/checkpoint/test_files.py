"""Files that hold more than weights, and files that are none."""

import argparse
import builtins
import codecs
import os
import pickle
import types
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch

from lite_detr.checkpoint import DetrCheckpointer, WeightsError, read_weights


class Hostile:
    """Makes a directory as soon as it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def save_torch(content, path):
    torch.save(content, path)


def save_old_torch(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


SAVERS = [
    ("a.pth", save_torch),
    ("a.bin", save_torch),
    ("a.pyth", save_torch),
    ("a.pth", save_old_torch),
    ("a.pkl", save_pickle),
]


def load(path):
    DetrCheckpointer(torch.nn.Linear(2, 2), fine_tune=True).load(str(path))


@pytest.mark.parametrize("read", [load, lambda path: read_weights(str(path))])
@pytest.mark.parametrize("name, save", SAVERS)
def test_files_that_would_run_code_are_refused(read, name, save, tmp_path):
    target = tmp_path / "run"
    path = tmp_path / name
    weight = np.zeros(1) if name.endswith(".pkl") else torch.zeros(1)
    save({"model": {"weight": weight}, "extra": Hostile(target)}, path)
    with pytest.raises(WeightsError, match=r"refused: they refer to (posix|nt)\.mkdir") as error:
        read(path)
    assert "\n" not in str(error.value)
    assert not target.exists()
    # The payload works, where nobody takes care.
    if name.endswith(".pkl"):
        pickle.loads(path.read_bytes())
        assert target.exists()


@pytest.mark.parametrize("name, save", SAVERS)
def test_a_hostile_checkpoint_is_not_resumed(name, save, tmp_path):
    """Whatever ``last_checkpoint`` says, and wherever it leads."""
    target = tmp_path / "run"
    (tmp_path / "out").mkdir()
    save({"model": {}, "trainer": Hostile(target)}, tmp_path / name)
    (tmp_path / "out" / "last_checkpoint").write_text(f"../{name}")
    checkpointer = DetrCheckpointer(torch.nn.Linear(2, 2), str(tmp_path / "out"))
    with pytest.raises(WeightsError, match="nothing to resume from"):
        checkpointer.resume_or_load("", resume=True)
    assert not target.exists()


def test_switching_pytorchs_safety_off_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for name, save in SAVERS:
        save({"model": {}, "model_state": Hostile(tmp_path / "run")}, tmp_path / name)
        with pytest.raises(WeightsError, match="are refused"):
            load(tmp_path / name)
    assert not (tmp_path / "run").exists()


class Codec:
    """Names a codec, which Python would import by its name."""

    def __reduce__(self):
        return codecs.encode, ("text", "zlib_codec")


def test_a_pickle_may_name_no_codec_but_that_of_bytes(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": Codec()}, protocol=2))
    with pytest.raises(WeightsError, match="refer to the codec zlib_codec"):
        read_weights(str(tmp_path / "a.pkl"))


def load_linear(content, path):
    """Loads a pickle into a linear layer and returns its weight."""
    path.write_bytes(pickle.dumps(content, protocol=2))
    model = torch.nn.Linear(2, 2)
    DetrCheckpointer(model, fine_tune=True).load(str(path))
    return model.weight.detach().numpy()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"model": weights, "__author__": "somebody"},
        lambda weights: {"blobs": weights | {"weight_momentum": np.zeros(1)}},
        lambda weights: weights,
    ],
    ids=["model zoo", "Caffe2's detectors", "Caffe2's classifiers"],
)
def test_pickles_of_all_of_detectron2s_kinds_are_loaded(wrap, tmp_path):
    weights = {"weight": np.arange(4, dtype=np.float32).reshape(2, 2)}
    assert np.array_equal(load_linear(wrap(weights), tmp_path / "a.pkl"), weights["weight"])


def test_the_references_command_line_is_accepted(tmp_path):
    """Beside what their training keeps: schedules count milestones."""
    content = {
        "model": {"weight": torch.ones(2)},
        "args": argparse.Namespace(lr=1e-4, backbone="resnet50", milestones=[11]),
        "lr_scheduler": {"milestones": Counter([11])},
        "epoch": 35,
    }
    torch.save(content, tmp_path / "a.pth")
    assert torch.equal(read_weights(str(tmp_path / "a.pth"))["weight"], torch.ones(2))


def test_no_other_class_is(tmp_path):
    torch.save({"model": {}, "args": types.SimpleNamespace(lr=1e-4)}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="refer to types.SimpleNamespace"):
        read_weights(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_of_arrays(protocol, tmp_path):
    arrays = OrderedDict(a=np.arange(6, dtype=np.float32).reshape(2, 3), b=np.float64(2))
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol=protocol))
    weights = read_weights(str(tmp_path / "a.pkl"))
    assert np.array_equal(weights["a"], arrays["a"]) and weights["b"] == 2


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"a": torch.arange(3.0)}, tmp_path / "a.safetensors")
    weights = read_weights(str(tmp_path / "a.safetensors"))
    assert torch.equal(weights["a"], torch.arange(3.0))


def test_safetensors_without_the_library(tmp_path, monkeypatch):
    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importing(name, *args, **kwargs)

    importing = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(WeightsError, match="pip install safetensors"):
        read_weights(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("name", ["a.pth", "a.pkl", "a.safetensors", "a.bin"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\x80\x02}q\x00", b"PK\x03\x04"])
def test_broken_files(name, content, tmp_path):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    (tmp_path / name).write_bytes(content)
    for read in (load, lambda path: read_weights(str(path))):
        with pytest.raises(WeightsError, match="not a checkpoint") as error:
            read(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"model": [1]}, {"model": {"a": 1}}, 3])
def test_files_without_weights(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(WeightsError):
        load(tmp_path / "a.pth")
