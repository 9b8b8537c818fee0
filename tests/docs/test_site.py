"""The documentation as a site; needs the extra ``docs``, which ``make docs`` installs."""

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pytest
from page_commands import blocks, pages
from programs import ROOT

for module in ("material", "mkdocs", "mkdocstrings_handlers.python"):
    pytest.importorskip(module, reason="needs what `make docs` installs")
sys.path.append(str(ROOT / "tools" / "docs"))

import griffe  # noqa: E402
from markdown import markdown  # noqa: E402
from site_docstrings import SiteDocstrings  # noqa: E402
from site_pages import RepositoryLinks, RepositoryLinksExtension  # noqa: E402


class Page(HTMLParser):
    """What the tests ask of a page.

    Attributes:
        requests: what a browser fetches for it.
        ids: the anchors.
        classes: of all elements.
        texts: of its paragraphs.
    """

    def __init__(self, html: str):
        super().__init__()
        self.requests: list[str] = []
        self.ids: set[str] = set()
        self.classes: list[str] = []
        self.texts: list[str] = []
        self.in_paragraph = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag != "a":
            self.requests += [given[name] for name in ("src", "href", "srcset") if name in given]
        self.ids.add(given.get("id", ""))
        self.classes += given.get("class", "").split()
        if tag == "p":
            self.in_paragraph = True
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self.in_paragraph = False

    def handle_data(self, data: str) -> None:
        if self.in_paragraph:
            self.texts[-1] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    build = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    return folder


@pytest.fixture(scope="module")
def site(folder):
    """All pages, by their paths in the site."""
    paths = folder.rglob("*.html")
    return {path.relative_to(folder).as_posix(): Page(path.read_text()) for path in paths}


def test_nothing_is_fetched_from_elsewhere(folder, site):
    fetched = {url for page in site.values() for url in page.requests}
    assert any(url.endswith(".css") for url in fetched)
    assert [url for url in fetched if urlsplit(url).netloc] == []
    styles = "".join(path.read_text() for path in folder.rglob("*.css"))
    assert re.findall(r"url\(['\"]?(?:https?:)?//", styles) == []
    # Material would load the library that draws these from elsewhere.
    assert [name for name, page in site.items() if "mermaid" in page.classes] == []


def test_lists_and_tables_are_not_taken_for_text(site):
    lines = [line for page in site.values() for text in page.texts for line in text.splitlines()]
    assert lines
    assert [line for line in lines if re.match(r" *([-*|]|\d+\.|```) ", line)] == []


def test_what_a_block_needs_stands_above_it(site):
    titles = [block.title for page in pages() for block in blocks(page.read_text()) if block.title]
    shown = sum(page.classes.count("filename") for page in site.values())
    assert shown == len(titles)


def test_pages_of_the_root_are_pages_of_the_site(site):
    assert {"index.html", "CONTRIBUTING.html", "CHANGELOG.html"} <= set(site)


@pytest.mark.parametrize("package", ["modeling", "ops", "checkpoint", "data.coco"])
def test_all_that_a_package_exports_is_described(site, package):
    module = importlib.import_module(f"lite_detr.{package}")
    described = set().union(*(page.ids for page in site.values()))
    # A name stands where it is defined, or where it is imported to.
    missing = [
        name
        for name in module.__all__
        if not {f"{module.__name__}.{name}", f"{getattr(module, name).__module__}.{name}"}
        & described
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("page", "link", "html"),
    [
        ("guide.md", "[a](api/ops.md#b)", '<a href="api/ops.md#b">a</a>'),
        ("api/ops.md", "[a](../guide.md)", '<a href="../guide.md">a</a>'),
        ("guide.md", "[a](../CONTRIBUTING.md)", '<a href="CONTRIBUTING.md">a</a>'),
        ("CONTRIBUTING.md", "[a](docs/guide.md#b)", '<a href="guide.md#b">a</a>'),
        ("index.md", "[a](docs/guide.md#b)", '<a href="guide.md#b">a</a>'),
        ("guide.md", "[a](../README.md#b)", '<a href="index.md#b">a</a>'),
        ("api/ops.md", "[a](../../code.py)", '<abbr title="in the repository: code.py">a</abbr>'),
        ("CONTRIBUTING.md", "[a](code.py)", '<abbr title="in the repository: code.py">a</abbr>'),
        ("guide.md", "[guide.md](guide.md)", '<a href="guide.md">The guide</a>'),
        ("guide.md", "[docs/guide.md](guide.md)", '<a href="guide.md">The guide</a>'),
        # For MkDocs to complain of.
        ("guide.md", "[a](../no.md)", '<a href="../no.md">a</a>'),
        ("guide.md", "[a](https://example.org)", '<a href="https://example.org">a</a>'),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(tmp_path, page, link, html):
    for path in ("docs/guide.md", "docs/api/ops.md", "CONTRIBUTING.md", "README.md", "code.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("# The guide\n")
    links = RepositoryLinks(tmp_path, "docs")
    links.page = page
    assert markdown(link, extensions=[RepositoryLinksExtension(links)]) == f"<p>{html}</p>"


@pytest.fixture
def package():
    """A package whose docstrings have been rewritten for the site."""
    code = {
        "one.py": '"""Of :class:`Two` and :class:`Nowhere`."""',
        "two.py": '''
            from torch import Tensor
            class Two:
                """Makes a :class:`Tensor`.

                Args:
                    height, width: in pixels,
                        both.
                    this, that: are no arguments.
                """
                def __init__(self, height: int, width: int): ...
        ''',
    }
    with griffe.temporary_visited_package(
        "planted", code, extensions=griffe.load_extensions(SiteDocstrings())
    ) as package:
        yield package


def test_roles_become_links_and_unknown_names_are_warned_of(package, caplog):
    text = package["one"].docstring.value
    assert 'identifier="planted.two.Two" optional><code>Two</code>' in text
    assert "`Nowhere`" in text
    assert "`Tensor`" in package["two.Two"].docstring.value
    assert ":class:" not in text


def test_arguments_that_share_a_description_are_listed_separately(package):
    text = package["two.Two"].docstring.value
    assert "    height: in pixels,\n        both.\n    width: in pixels,\n        both.\n" in text
    assert "    this, that: are" in text
