"""What `make install` installs: each package in one version, of a file whose hash is known."""

import re
import tomllib

import pytest
from programs import ROOT

FOLDER = ROOT / "requirements"
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==(\S+)", re.MULTILINE)


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name):
    text = (FOLDER / name).read_text()
    return {normal(package): version for package, version in PIN.findall(text)}


@pytest.mark.parametrize("name", ["build.txt", "install.txt", "docs.txt", "detectron2.txt"])
def test_every_package_has_a_version_and_a_hash(name):
    text = (FOLDER / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==\S+( ;.+?)?(\s+--hash=sha256:[0-9a-f]{64})+\s*", line), line
    assert len(lines) == len(pins(name)) > 0


@pytest.mark.parametrize("name", ["build", "install", "docs"])
def test_what_is_asked_for_is_what_is_locked(name):
    """Fails where `make lock` was forgotten."""
    locked = pins(f"{name}.txt")
    asked = pins(f"{name}.in")
    assert {package: locked.get(package) for package in asked} == asked


def test_both_files_agree():
    install, docs = pins("install.txt"), pins("docs.txt")
    assert {p: docs[p] for p in install.keys() & docs} == {
        p: install[p] for p in install.keys() & docs
    }


def test_what_the_package_depends_on_is_locked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    install = project["dependencies"] + extras["demo"] + extras["dev"] + extras["export"]
    for name, needed in (("install.txt", install), ("docs.txt", extras["docs"])):
        names = {normal(re.match(r"[\w.-]+", text)[0]) for text in needed}
        assert names <= pins(name).keys()
