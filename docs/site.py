"""A hook of mkdocs: pages that stand elsewhere in the repository, files that pages link to there, and a check that the
site loads nothing from another host.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# Files of the repository that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "SECURITY.md": "security.md",
    "deploy/README.md": "how-to/deploy.md",
}
_SOURCES = {page: source for source, page in PAGES.items()}
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")
_LOADED = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^\"'> ]+")


def _source(page: str) -> str:
    """The file of the repository behind ``page`` of the site."""
    return _SOURCES.get(page, f"docs/{page}")


def _place(source: str) -> str:
    """Where the site has ``source``, a file of the repository."""
    return PAGES.get(source) or (source[5:] if source.startswith("docs/") else f"files/{source}")


def _links(page: str, text: str) -> list[str]:
    """The files of the repository to which ``page`` links."""
    return [os.path.normpath(os.path.join(os.path.dirname(_source(page)), target)) for target in _LINK.findall(text)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages, and files that pages link to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for file in list(files.documentation_pages()):
        for source in _links(file.src_uri, (ROOT / _source(file.src_uri)).read_text()):
            place = _place(source)
            if place.startswith("files/") and (ROOT / source).is_file() and files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links between files of the repository become links between pages."""
    uri = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        source = os.path.normpath(os.path.join(os.path.dirname(_source(uri)), match[1]))
        return os.path.relpath(_place(source), os.path.dirname(uri) or ".")

    return _LINK.sub(moved, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse what a browser would load from another host."""
    for path in Path(config.site_dir).rglob("*.html"):
        found = _LOADED.search(path.read_text())
        if found and "files" not in path.relative_to(config.site_dir).parts[:1]:
            raise PluginError(f"{path.name} loads from another host: {found[0]}")
