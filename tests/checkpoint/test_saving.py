"""Checkpoints are written whole or not at all, and the last whole one is resumed."""

import errno
import logging
import os
import resource
import signal
import urllib.error
import zipfile

import pytest
import torch

from lite_detr.checkpoint import DetrCheckpointer, SaveError, WeightsError
from lite_detr.checkpoint.files import atomic_open
from lite_detr.errors import DownloadError


class Counter:
    """Stands for a trainer: a checkpointable that knows its iteration."""

    def __init__(self):
        self.iteration = -1

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


class Detector(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = torch.nn.Linear(400, 100)


def build(folder):
    counter = Counter()
    return DetrCheckpointer(Detector(), str(folder), trainer=counter), counter


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of three iterations."""
    checkpointer, counter = build(tmp_path)
    for counter.iteration in (1, 3, 5):
        torch.nn.init.constant_(checkpointer.model.decoder.weight, counter.iteration)
        checkpointer.save(f"model_{counter.iteration:07d}", iteration=counter.iteration)
    return tmp_path


@pytest.mark.parametrize("fine_tune", [False, True])
def test_the_names_of_the_classes_are_saved_and_given_to_a_model_without(fine_tune, tmp_path):
    checkpointer, _ = build(tmp_path)
    checkpointer.model.class_names = ("cat", "dog")
    checkpointer.save("named")
    other = DetrCheckpointer(Detector(), fine_tune=fine_tune)
    rest = other.load(str(tmp_path / "named.pth"))
    assert "class_names" not in rest
    # Training that starts from weights may be for other classes.
    names = getattr(other.model, "class_names", None)
    assert names == (None if fine_tune else ("cat", "dog"))


@pytest.mark.parametrize(
    ("own", "num_classes", "said"),
    [
        (("dog", "cat"), 2, "class 0 is 'cat' in them and 'dog' in the dataset given"),
        (None, 3, "name 2 classes and the model has 3"),
    ],
)
def test_names_that_do_not_fit_are_said_and_not_used(own, num_classes, said, tmp_path, caplog):
    checkpointer, _ = build(tmp_path)
    checkpointer.model.class_names = ("cat", "dog")
    checkpointer.save("named")
    other = DetrCheckpointer(Detector())
    other.model.class_names, other.model.num_classes = own, num_classes
    with caplog.at_level(logging.WARNING, "lite_detr"):
        other.load(str(tmp_path / "named.pth"))
    assert other.model.class_names == own and said in caplog.text


def resume(folder):
    """The iteration that a new process would resume, and the weight's value."""
    checkpointer, counter = build(folder)
    checkpointer.resume_or_load("", resume=True)
    assert checkpointer.resumed
    return counter.iteration, checkpointer.model.decoder.weight[0, 0].item()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def truncate(path, share):
    os.truncate(path, int(path.stat().st_size * share))


def zero_a_block(path):
    """What a machine leaves that lost its power before the data were on the disk."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))


def test_a_save_leaves_the_checkpoint_its_tag_and_nothing_else(saved):
    names = {path.name for path in saved.iterdir()}
    assert names == {f"model_000000{i}.pth" for i in (1, 3, 5)} | {"last_checkpoint"}
    assert resume(saved) == (5, 5.0)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_named_and_the_one_before_it_taken(share, saved, caplog):
    truncate(saved / "model_0000005.pth", share)
    with caplog.at_level(logging.WARNING, "lite_detr"):
        assert resume(saved) == (3, 3.0)
    [message] = caplog.messages
    assert f"{saved}/model_0000005.pth" in message
    assert f"Going on from {saved}/model_0000003.pth" in message


def test_a_damaged_block_is_noticed(saved, caplog):
    zero_a_block(saved / "model_0000005.pth")
    with caplog.at_level(logging.WARNING, "lite_detr"):
        assert resume(saved) == (3, 3.0)
    assert "model_0000005.pth are broken" in caplog.text and "Bad CRC" in caplog.text


def test_all_broken_ones_before_it_are_named(saved, caplog):
    truncate(saved / "model_0000005.pth", 0.5)
    zero_a_block(saved / "model_0000003.pth")
    with caplog.at_level(logging.WARNING, "lite_detr"):
        assert resume(saved) == (1, 1.0)
    assert "model_0000005.pth" in caplog.text and "model_0000003.pth" in caplog.text


@pytest.mark.parametrize("tag", ["", "model_0000007.pth", "\0"])
def test_a_tag_that_leads_nowhere_is_not_the_end(tag, saved):
    (saved / "last_checkpoint").write_text(tag)
    assert resume(saved) == (5, 5.0)


def test_what_an_older_training_left_in_the_folder_is_not_taken(saved):
    """It may have come further."""
    checkpointer, counter = build(saved)
    counter.iteration = 2
    for name in ("model_0000002", "model_0000004"):
        checkpointer.save(name, iteration=2)
    truncate(saved / "model_0000004.pth", 0.5)
    assert resume(saved)[0] == 2


def test_weights_alone_are_not_resumed(saved):
    truncate(saved / "model_0000005.pth", 0.5)
    torch.save({"model": Detector().state_dict()}, saved / "converted.pth")
    assert resume(saved) == (3, 3.0)


def test_where_all_are_broken_the_error_names_them_and_says_what_to_do(saved):
    for path in saved.glob("*.pth"):
        truncate(path, 0.5)
    with pytest.raises(WeightsError, match="nothing to resume from") as error:
        resume(saved)
    for iteration in (1, 3, 5):
        assert f"model_000000{iteration}.pth" in str(error.value)
    assert "leave out --resume" in str(error.value)


def test_a_checkpoint_of_another_model_is_no_broken_one(saved):
    checkpointer = DetrCheckpointer(torch.nn.Sequential(), str(saved), trainer=Counter())
    checkpointer.model.add_module("decoder", torch.nn.Linear(2, 2))
    with pytest.raises(WeightsError, match="do not fit the config"):
        checkpointer.resume_or_load("", resume=True)


def test_the_first_start_of_a_job_that_always_resumes_may_begin_with_a_backbone(tmp_path):
    torch.save({"backbone.weight": torch.zeros(1, 2)}, tmp_path / "backbone.pth")
    checkpointer, _ = build(tmp_path / "out")
    checkpointer.model.backbone = torch.nn.Linear(2, 1)
    checkpointer.resume_or_load(str(tmp_path / "backbone.pth"), resume=True)
    assert not checkpointer.resumed


@pytest.fixture
def small_disk():
    """Writes beyond 64 kB fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_what_was_there_and_says_so(saved, small_disk):
    before = contents(saved)
    checkpointer, counter = build(saved)
    counter.iteration = 7
    for name in ("model_0000007", "model_0000005"):
        with pytest.raises(SaveError, match=rf"{name}\.pth cannot be written: .+ as they were"):
            checkpointer.save(name, iteration=7)
    assert contents(saved) == before
    assert resume(saved) == (5, 5.0)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_errors_of_the_system_leave_what_was_there(function, saved, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(saved)
    checkpointer, counter = build(saved)
    monkeypatch.setattr(os, function, full)
    with pytest.raises(SaveError, match="No space left on device"):
        checkpointer.save("model_0000005", iteration=7)
    assert contents(saved) == before


def test_what_a_killed_save_left_is_removed_by_the_next(saved):
    (saved / "model_0000004.pth.unfinished").write_bytes(b"half")
    assert resume(saved) == (5, 5.0)
    checkpointer, _ = build(saved)
    checkpointer.save("model_0000006", iteration=6)
    assert not list(saved.glob("*.unfinished"))


def test_the_file_is_on_the_disk_before_it_gets_its_name_and_the_tag_comes_last(saved, monkeypatch):
    calls = []

    def note(name, function, *args):
        calls.append((name, *(os.path.basename(arg) for arg in args if isinstance(arg, str))))
        return function(*args)

    checkpointer, _ = build(saved)
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: note("fsync", fsync, fd))
    monkeypatch.setattr(os, "replace", lambda a, b: note("replace", replace, str(a), str(b)))
    checkpointer.save("model_0000007", iteration=7)
    file, tag = "model_0000007.pth", "last_checkpoint"
    assert calls == [
        ("fsync",),
        ("replace", f"{file}.unfinished", file),
        ("fsync",),
        ("fsync",),
        ("replace", f"{tag}.unfinished", tag),
        ("fsync",),
    ]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_open(tmp_path / "a", "w") as file:
        file.write("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_other_places_than_local_ones_are_left_to_their_handlers(tmp_path, monkeypatch):
    checkpointer, _ = build("far://folder")
    opened = []

    def open_far(path, mode="r", **options):
        opened.append((path, mode))
        return open(tmp_path / os.path.basename(path), mode)

    monkeypatch.setattr(checkpointer.path_manager._path_manager, "open", open_far)
    checkpointer.save("a")
    assert opened == [("far://folder/a.pth", "wb"), ("far://folder/last_checkpoint", "w")]
    assert zipfile.is_zipfile(tmp_path / "a.pth")


def test_without_a_tag_the_checkpoint_that_came_furthest_is_resumed(saved, caplog):
    """Copied files have the times of the copy."""
    (saved / "last_checkpoint").unlink()
    for number, path in enumerate(sorted(saved.glob("*.pth"), reverse=True)):
        os.utime(path, (number, number))
    torch.save({"model": Detector().state_dict()}, saved / "converted.pth")
    with caplog.at_level(logging.WARNING, "lite_detr"):
        assert resume(saved) == (5, 5.0)
    assert f"there is no {saved}/last_checkpoint. Going on from" in caplog.text


def test_without_a_tag_and_a_valid_checkpoint_nothing_is_overwritten(saved):
    (saved / "last_checkpoint").unlink()
    for path in saved.glob("*.pth"):
        truncate(path, 0.5)
    with pytest.raises(WeightsError, match="nothing to resume from"):
        resume(saved)


def test_a_folder_of_weights_alone_is_a_first_start(tmp_path):
    torch.save({"model": Detector().state_dict()}, tmp_path / "weights.pth")
    checkpointer, _ = build(tmp_path)
    checkpointer.resume_or_load("", resume=True)
    assert not checkpointer.resumed


@pytest.mark.parametrize(
    "tag", [b"../model_0000005.pth", b"/dev/zero", b"\xff\xfe", b".", b"a\nb", b"x" * 5000]
)
def test_a_tag_that_is_not_a_files_name_is_not_followed(tag, saved, caplog):
    (saved / "last_checkpoint").write_bytes(tag)
    with caplog.at_level(logging.WARNING, "lite_detr"):
        assert resume(saved) == (5, 5.0)
    assert "last_checkpoint does not hold the name of a file" in caplog.text


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "dangling link"])
def test_a_tag_that_is_not_a_file_is_not_read(kind, saved, caplog):
    tag = saved / "last_checkpoint"
    tag.unlink()
    if kind == "folder":
        tag.mkdir()
    elif kind == "pipe":
        os.mkfifo(tag)
    else:
        tag.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with caplog.at_level(logging.WARNING, "lite_detr"):
        assert resume(saved) == (5, 5.0)
    assert "last_checkpoint does not hold the name of a file" in caplog.text


def test_a_tag_that_names_a_device_is_not_followed(saved):
    (saved / "last_checkpoint").write_text("endless.pth")
    (saved / "endless.pth").symlink_to("/dev/zero")
    assert resume(saved) == (5, 5.0)


def test_weights_that_cannot_be_downloaded_are_one_line(monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(DownloadError, match="https://nowhere.invalid/a.pth cannot be") as error:
        DetrCheckpointer(Detector()).load("https://nowhere.invalid/a.pth")
    assert "train.init_checkpoint=FILE" in str(error.value) and "\n" not in str(error.value)
