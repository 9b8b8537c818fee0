"""Add to the documentation's site what MkDocs lacks: pages of the root, and links out of docs/.

A hook of MkDocs (``hooks`` in mkdocs.yml). Pages are written for readers of the repository, whose
links lead anywhere in it; README is the site's home. On the site a link to a page becomes one to
the site's page, and takes the page's title if it is named after the file. A link to any other file
becomes a text with the file's path as a tooltip, since the site does not know where its repository
is. MkDocs then checks all links and anchors, those of README included.
"""

import posixpath
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# The site's pages that lie in the repository's root, by their names on the site.
ROOT_PAGES = {
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}


class RepositoryLinks(Treeprocessor):
    """Turns links as they are in the repository into links as MkDocs expects them.

    Args:
        root: the repository.
        docs: the folder of the pages, relative to it.
    """

    def __init__(self, root: Path, docs: str):
        super().__init__()
        self.root = root
        self.docs = docs
        # The page that is being rendered, by its name on the site.
        self.page = ""

    def run(self, tree: ElementTree.Element) -> None:
        for element in list(tree.iter()):
            attribute = {"a": "href", "img": "src"}.get(element.tag)
            url = urlsplit(element.get(attribute, "")) if attribute else None
            # Without a path it leads to the page itself, or is an anchor of a docstring.
            if not url or url.scheme or url.netloc or not url.path or url.path.startswith("/"):
                continue
            path = self.repository_path(unquote(url.path))
            page = self.site_path(path)
            if page is not None:
                start = posixpath.dirname(self.page)
                link = url._replace(path=posixpath.relpath(page, start or "."))
                element.set(attribute, link.geturl())
                if element.text and path.endswith(element.text) and page.endswith(".md"):
                    element.text = title(self.root / path)
            elif (self.root / path).exists():
                element.tag = "abbr"
                element.attrib = {"title": f"in the repository: {path}"}

    def repository_path(self, path: str) -> str:
        """Return a link's path relative to the repository, given that relative to the page."""
        source = ROOT_PAGES.get(self.page) or posixpath.join(self.docs, self.page)
        return posixpath.normpath(posixpath.join(posixpath.dirname(source), path))

    def site_path(self, path: str) -> str | None:
        """Return the site's name of a page or picture of the repository; None if it has none."""
        for page, source in ROOT_PAGES.items():
            if path == source:
                return page
        inside = path.startswith(f"{self.docs}/") and (self.root / path).is_file()
        return posixpath.relpath(path, self.docs) if inside else None


def title(page: Path) -> str:
    """Return a page's first heading; its name if it has none."""
    lines = page.read_text().splitlines()
    return next((line[2:] for line in lines if line.startswith("# ")), page.name)


class RepositoryLinksExtension(Extension):
    """Runs :class:`RepositoryLinks` after links are parsed and before MkDocs checks them."""

    def __init__(self, links: RepositoryLinks):
        super().__init__()
        self.links = links

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        md.treeprocessors.register(self.links, "repository_links", 5)


def on_config(config: MkDocsConfig) -> None:
    root = Path(config.config_file_path).parent
    config.repository_links = RepositoryLinks(root, Path(config.docs_dir).name)
    config.markdown_extensions.append(RepositoryLinksExtension(config.repository_links))


def on_files(files: Files, config: MkDocsConfig) -> None:
    for page, source in ROOT_PAGES.items():
        path = config.repository_links.root / source
        if path.is_file():
            files.append(File.generated(config, page, abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    config.repository_links.page = page.file.src_uri
