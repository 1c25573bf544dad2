"""Hooks of mkdocs: add the generated pages, the README as the first page, and the files that pages link to.

Links of the handwritten pages are those of the repository, so that they also work where the repository is read. Here a
link to a file outside of `docs/` becomes a link to a copy of the file, or to a page with its text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from generated import ROOT, generated_pages
from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

_LINK = re.compile(r"(?<=\]\()([^)\s#]+)((?:#[^)\s]*)?)(?=\))")
_TEXTS = {".py": "python", ".yaml": "yaml", ".cff": "yaml", "": "text"}
"""Suffix of a file whose text is shown on a page -> language of the text."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the generated pages to the navigation."""
    titles: dict[str, list[dict[str, str]]] = {}
    for folder, name, _ in generated_pages():
        titles.setdefault(folder.capitalize(), []).append({name: f"{folder}/{name}.md"})
    assert config.nav is not None
    config.nav.extend({title: pages} for title, pages in titles.items())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and every file outside of `docs/` that a page links to."""
    texts = {f"{folder}/{name}.md": text for folder, name, text in generated_pages()}
    texts["index.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
    handwritten = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for uri, text in texts.items():
        files.append(File.generated(config, uri, content=text))
    waiting, known = list((handwritten | texts).items()), set[str]()
    while waiting:
        uri, text = waiting.pop()
        for path in linked_files(uri, text):
            target = site_uri(path)
            if target in known or files.get_file_from_path(target):
                continue
            known.add(target)
            file = _linked_file(config, path, target)
            files.append(file)
            if file.is_documentation_page():
                waiting.append((target, file.content_string))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to files of the repository by links inside the site."""
    base = page.file.src_uri

    def site_link(match: re.Match[str]) -> str:
        path = repository_path(base, match[1])
        if path is None:
            return match[0]
        return posixpath.relpath(site_uri(path), posixpath.dirname(base) or ".") + match[2]

    return _LINK.sub(site_link, markdown)


def linked_files(uri: str, text: str) -> list[str]:
    """Return the files outside of `docs/` that a page links to, as paths inside the repository."""
    paths = [repository_path(uri, match[1]) for match in _LINK.finditer(text)]
    return [path for path in paths if path and not path.startswith("docs/") and path != "README.md"]


def repository_path(uri: str, target: str) -> str | None:
    """Return the file or folder of the repository that a link of a page leads to; None for other links."""
    if target.startswith(ROOT.as_uri()):
        return target.removeprefix(f"{ROOT.as_uri()}/")
    if re.match(r"[a-z]+:", target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source_of_page(uri)), target))
    return path if (ROOT / path).exists() else None


def source_of_page(uri: str) -> str:
    """Return the file of the repository that a page shows."""
    if uri == "index.md":
        return "README.md"
    return uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"


def site_uri(path: str) -> str:
    """Return the place of a file of the repository in the site."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    shown_as_text = Path(path).suffix in _TEXTS
    return f"repository/{path}.md" if shown_as_text else f"repository/{path}"


def _linked_file(config: MkDocsConfig, path: str, uri: str) -> File:
    """Return a copy of a file, or a page with its text."""
    source = ROOT / path
    if Path(path).suffix not in _TEXTS:
        return File.generated(config, uri, abs_src_path=str(source))
    text = source.read_text(encoding="utf-8").rstrip()
    return File.generated(config, uri, content=f"# {path}\n\n````{_TEXTS[Path(path).suffix]}\n{text}\n````\n")
