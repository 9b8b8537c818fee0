"""What `make install` installs on each Python: one version of each package, with known hashes."""

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from programs import ROOT, project

FOLDER = ROOT / "requirements"
PYTHONS = re.search(r"^PYTHONS := (.+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


def lines_of(name):
    text = (FOLDER / name).read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith(("#", "-c "))]


def pins(name, python=PYTHONS[0]):
    """The versions of packages for a Python; empty for those without one."""
    machine = {"sys_platform": "linux", "platform_machine": "x86_64"}
    machine |= {"python_version": python, "python_full_version": f"{python}.7"}
    found = {}
    for line in lines_of(name):
        requirement = Requirement(line.partition("--hash")[0])
        if requirement.marker is None or requirement.marker.evaluate(machine):
            package = canonicalize_name(requirement.name)
            assert package not in found, f"{name} has {package} twice for Python {python}"
            found[package] = str(requirement.specifier).removeprefix("==")
    return found


@pytest.mark.parametrize(
    "name", ["build.txt", "install.txt", "wheel.txt", "app.txt", "docs.txt", "detectron2.txt"]
)
def test_every_package_has_a_version_and_a_hash(name):
    for line in lines_of(name):
        assert re.fullmatch(r"[\w.-]+==\S+( ;.+?)?(\s+--hash=sha256:[0-9a-f]{64})+\s*", line), line
    assert pins(name)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", ["build", "install", "wheel", "app"])
def test_what_is_asked_for_is_what_is_locked(name, python):
    """Fails where `make lock` was forgotten."""
    locked, asked = pins(f"{name}.txt", python), pins(f"{name}.in", python)
    assert asked and asked.keys() <= locked.keys()
    assert {p: locked[p] for p in asked if asked[p]} == {p: asked[p] for p in asked if asked[p]}


def test_the_docs_are_locked_for_the_preferred_python():
    locked, asked = pins("docs.txt"), pins("docs.in")
    assert {package: locked.get(package) for package in asked} == asked


def test_both_files_agree():
    install, docs = pins("install.txt"), pins("docs.txt")
    assert {p: docs[p] for p in install.keys() & docs} == {
        p: install[p] for p in install.keys() & docs
    }


@pytest.mark.parametrize("python", PYTHONS)
def test_the_page_shares_the_packages_of_the_others_except_for_one(python):
    install, app = pins("install.txt", python), pins("app.txt", python)
    differing = {package for package in install.keys() & app if app[package] != install[package]}
    assert differing <= {"pillow"}
    for text in project()["project"]["optional-dependencies"]["app"]:
        requirement = Requirement(text)
        versions = install | app
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text


@pytest.mark.parametrize("python", PYTHONS)
def test_what_the_package_depends_on_is_locked(python):
    extras = project()["project"]["optional-dependencies"]
    asked = project()["project"]["dependencies"] + extras["demo"] + extras["dev"] + extras["export"]
    locked = pins("install.txt", python)
    for text in asked:
        requirement = Requirement(text)
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), text
    assert {canonicalize_name(Requirement(text).name) for text in extras["docs"]} <= pins(
        "docs.txt"
    ).keys()


def test_the_lowest_python_of_the_package_is_the_lowest_that_make_installs_for():
    lowest = min(PYTHONS, key=lambda python: tuple(map(int, python.split("."))))
    assert project()["project"]["requires-python"] == f">={lowest}"
