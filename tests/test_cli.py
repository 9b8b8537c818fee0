"""Argument types of the command line, and how a program ends on an error that its user can mend."""

import argparse
import errno
import os
from pathlib import Path

import pytest
from detectron2.utils import comm

from lite_detr import cli
from lite_detr.errors import WeightsError


@pytest.mark.parametrize("text, size", [("64x96", (64, 96)), ("1x1", (1, 1))])
def test_height_comes_first(text, size):
    assert cli.size(text) == size


@pytest.mark.parametrize("text", ["64", "64x", "x64", "0x64", "64x0", "-1x5", "64x96x3", "axb", ""])
def test_sizes_that_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="HEIGHTxWIDTH"):
        cli.size(text)


def system_error(number):
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    "error, line",
    [
        (WeightsError("weights a.pth: there is no such file"), "weights a.pth: there is no such"),
        (system_error(errno.ENOSPC), "No space left on device: make room in train.output_dir, and"),
        (system_error(errno.EDQUOT), "Disk quota exceeded: make room"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "num_workers"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "num_workers"),
    ],
)
def test_user_errors_end_in_one_line(error, line, capsys):
    with pytest.raises(SystemExit) as end, cli.user_errors():
        raise error
    assert end.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and line in printed and printed.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), system_error(errno.EIO)])
def test_other_errors_keep_their_traceback(error, capsys):
    with pytest.raises(type(error)), cli.user_errors():
        raise error
    assert capsys.readouterr().err == ""


def test_an_interrupt_is_one_line_with_the_status_of_shells(capsys):
    with pytest.raises(SystemExit) as end, cli.user_errors():
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_the_first_process_prints_at_once_and_the_others_wait(monkeypatch):
    slept = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    for is_first in (True, False):
        monkeypatch.setattr(comm, "is_main_process", lambda is_first=is_first: is_first)
        with pytest.raises(SystemExit), cli.user_errors():
            raise WeightsError("none")
    assert slept == [cli.PATIENCE]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of empty files, of which one has another suffix."""
    for name in ("a.jpg", "b.png", "c.jpg", "notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


def test_files_and_patterns_each_once(folder):
    given = [str(folder / name) for name in ("c.jpg", "*.jpg", "notes.txt", "*.gif")]
    found, missing = cli.find_images(given)
    assert [path.name for path in found] == ["c.jpg", "a.jpg", "notes.txt"]
    assert missing == given[3:]


def test_a_name_with_brackets_is_not_a_pattern(folder):
    (folder / "a.jpg").rename(folder / "a[1].jpg")
    found, missing = cli.find_images([str(folder / "a[1].jpg")])
    assert [path.name for path in found] == ["a[1].jpg"] and not missing


def test_folders_are_searched_with_their_sub_folders(folder):
    for name in ("x/y/d.jpg", "x/a.jpg", ".hidden/e.jpg", "x/.f.jpg", "out/g.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    # A loop, and a second way to a folder.
    (folder / "x/y/up").symlink_to(folder, target_is_directory=True)
    (folder / "z").symlink_to(folder / "x", target_is_directory=True)
    found, missing = cli.find_images([str(folder)], exclude=folder / "out")
    assert {path.relative_to(folder): below for path, below in found.items()} == {
        Path("a.jpg"): Path(),
        Path("b.png"): Path(),
        Path("c.jpg"): Path(),
        Path("x/a.jpg"): Path("x"),
        Path("x/y/d.jpg"): Path("x/y"),
    }
    assert not missing
    pictures = cli.picture_paths(found, folder / "out")
    assert {str(path.relative_to(folder / "out")) for path in pictures} == {
        *("a.png", "b.png", "c.png", "x/a.png", "x/y/d.png"),
    }


def test_a_folder_whose_name_no_file_can_have_is_refused():
    with pytest.raises(argparse.ArgumentTypeError, match="File name too long"):
        cli.folder("x" * 5000)
