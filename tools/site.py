"""What mkdocs does not do by itself: pages of the site that lie elsewhere in the repository.

The README is the front page. A file outside docs/ that a page links to comes along, Markdown as a
page and anything else as it is: the same links work in a checkout, on a code host, and here.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ALWAYS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")

_LINK = re.compile(r"(\]\(|(?:src|href)=\")(?![a-z]+:|#)([^)\"#\s]+)")
_DRAWING = re.compile(r"^```mermaid\n.*?^```$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is linked to, and what that links to."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting += ALWAYS
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if not path.startswith("docs/"):
            source = str(ROOT / path)
            files.append(File.generated(config, _page_of(path), abs_src_path=source))
        if path.endswith(".md"):
            links = _LINK.findall((ROOT / path).read_text(encoding="utf-8"))
            found = (_target(path, link) for _, link in links)
            waiting += [target for target in found if (ROOT / target).is_file()]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where their targets are on the site."""
    here = page.file.src_uri
    path = _path_of(here)

    def rewritten(link: re.Match[str]) -> str:
        target = _target(path, link[2])
        if not (ROOT / target).is_file():
            return link[0]  # mkdocs complains of it
        return link[1] + posixpath.relpath(_page_of(target), posixpath.dirname(here) or ".")

    return _LINK.sub(rewritten, _DRAWING.sub("*(Drawn in the file itself.)*", markdown))


def _target(path: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def _page_of(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def _path_of(uri: str) -> str:
    """The opposite of :func:`_page_of`."""
    if uri == "index.md":
        return "README.md"
    return uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"
