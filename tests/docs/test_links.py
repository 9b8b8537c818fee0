"""Links of the markdown pages lead to what is there, and the navigation leads to all pages."""

import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_blocks import ROOT, pages, parse

LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)|^\[[^\]]+\]: +(\S+)", re.MULTILINE)
HEADING = re.compile(r"^#{1,6} +(.+?)\s*#*$", re.MULTILINE)
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
CHANGELOG = ROOT / "CHANGELOG.md"
PAGES = [*pages(), *filter(Path.is_file, [CHANGELOG])]


def without_blocks(text: str) -> str:
    """A page's text, with empty lines for its fenced blocks."""
    lines = text.splitlines()
    for block in parse(text, "page"):
        end = block.line + block.text.count("\n") + 1
        lines[block.line - 1 : end] = [""] * (end - block.line + 1)
    return "\n".join(lines)


def anchors(text: str) -> set[str]:
    """Those of the headings, as GitHub makes them; not those that several headings share."""
    headings = HEADING.findall(without_blocks(text))
    names = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower() for heading in headings]
    slugs = Counter(re.sub(r"[^\w\- ]", "", name).replace(" ", "-") for name in names)
    return {slug for slug, count in slugs.items() if count == 1}


def broken_links(page: Path, text: str) -> list[str]:
    """The links of a page's text within the repository that lead nowhere, with the reason."""
    broken = []
    for match in LINK.finditer(CODE.sub("", without_blocks(text))):
        target = match[1] or match[2]
        url = urlsplit(target)
        if url.scheme or url.netloc:
            continue
        file = page.parent / unquote(url.path) if url.path else page
        if url.path and not file.exists():
            broken.append(f"{target}: there is no {file}")
        elif url.fragment and file.suffix == ".md":
            content = text if file == page else file.read_text()
            if url.fragment not in anchors(content):
                broken.append(f"{target}: {file} has no such heading, or several")
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page):
    assert broken_links(page, page.read_text()) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("[a](other.md) [b](other.md#one-heading-of-it) [c](#here)\n# Here\n", 0),
        ("`[a](no.md)`, ``[b](`no.md)``\n\n```\n[c](no.md)\n# Here\n```\n", 0),
        ("[a `b` c](no.md), ![d](no.png)", 2),
        ("[a]\n\n[a]: no.md", 1),
        ("[a](other.md#no-heading) [b](#here)\n\n```bash\n# Here\n```\n", 2),
        ("[a](#twice)\n# Twice\n# Twice\n", 1),
        ("[a](https://example.org/no.md)", 0),
    ],
)
def test_a_link_that_leads_nowhere_is_found(tmp_path, text, count):
    (tmp_path / "other.md").write_text("# Other\n\n## One `heading`, of it\n")
    assert len(broken_links(tmp_path / "page.md", text)) == count


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = re.findall(r"^ +- (?:.+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    docs = {page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")}
    assert sorted(navigation) == sorted(docs | {"CONTRIBUTING.md", CHANGELOG.name})
