"""A hook of mkdocs: pages and files outside docs/ that the site shows, where they stand.

A link in a page is written as the source tree has it, so that it works on a code host too. What it
leads to becomes part of the site, be it in docs/ or not, and the link is written anew.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# Pages of the navigation that are not in docs/, by their place in the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
_CODE = re.compile(r"(^ *(```+).*?^ *\2$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")


def place(path: Path) -> str:
    """Where a file of the source tree stands in the site."""
    name = path.relative_to(ROOT).as_posix()
    return PAGES.get(name, name.removeprefix("docs/"))


def outside_code(change: re.Pattern[str], by: object, text: str) -> str:
    """``text`` with what matches replaced, blocks and spans of code left alone."""
    parts = _CODE.split(text)  # text, code, its fence, text, …
    return "".join(
        (change.sub(by, part) if i % 3 == 0 else part)  # type: ignore[call-overload]
        for i, part in enumerate(parts)
        if i % 3 != 2
    )


def linked(path: Path) -> set[Path]:
    """The files that a page links to."""
    found: set[Path] = set()

    def note(link: re.Match[str]) -> str:
        target = (path.parent / link[2]).resolve()
        if target.is_file() and ROOT in target.parents:
            found.add(target)
        return link[0]

    outside_code(_LINK, note, path.read_text())
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    todo = [ROOT / name for name in PAGES]
    todo += [Path(f.abs_src_path) for f in files.documentation_pages() if f.abs_src_path]
    seen = set(todo)
    while todo:
        path = todo.pop()
        if files.get_file_from_path(place(path)) is None:
            files.append(File.generated(config, place(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            new = linked(path) - seen
            seen |= new
            todo += new
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = Path(page.file.abs_src_path or "")

    def placed(link: re.Match[str]) -> str:
        target = (source.parent / link[2]).resolve()
        if not target.is_file() or ROOT not in target.parents:
            return link[0]  # mkdocs says that it leads nowhere
        here = posixpath.dirname(page.file.src_uri) or "."
        return f"{link[1]}{posixpath.relpath(place(target), here)}{link[3] or ''}"

    return outside_code(_LINK, placed, markdown)
