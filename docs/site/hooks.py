"""What mkdocs does beside its own for this site: pages made of docstrings and notebooks, and of every file outside of
docs/ that a page links to, so that no link leads out of the site."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

import notebooks
import reference
from mkdocs.structure.files import File, InclusionLevel
from pymdownx.slugs import slugify

ROOT = Path(__file__).parent.parent.parent
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCED = re.compile(r"^(`{3,}|~{3,}).*?^\1$", re.M | re.S)
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".cu": "cuda", ".cuh": "cuda", ".sh": "sh", ".yml": "yaml"}


def on_config(config: Any) -> Any:
    """Headings are linked to as GitHub links to them."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    (section,) = (entry["Reference"] for entry in config.nav if "Reference" in entry)
    section += [{title: uri} for title, uri in reference.titles().items()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """The pages and pictures that are not in docs/."""
    pages = {"changelog.md": (ROOT / "CHANGELOG.md").read_text(), **reference.pages(), **notebooks.pages()}
    waiting = {file.src_uri: Path(file.abs_src_path).read_text() for file in files.documentation_pages()} | pages
    seen = set(waiting)
    while waiting:  # pages of linked files have links too
        uri, text = waiting.popitem()
        for target in outside(uri, text):
            at = inside(target)
            if at in seen or at in pages:
                continue
            seen.add(at)
            if at.endswith(".md"):
                pages[at] = waiting[at] = shown(target)
            else:
                files.append(File.generated(config, at, abs_src_path=str(ROOT / target)))
    for uri, text in pages.items():
        level = InclusionLevel.NOT_IN_NAV if uri.startswith("source/") else InclusionLevel.UNDEFINED
        files.append(File.generated(config, uri, content=text, inclusion=level))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files outside of docs/ become links to their pages; names in the API's tables, to their docstrings."""
    uri = page.file.src_uri
    if uri == "api.md":
        markdown = reference.linked(markdown)

    def local(match: re.Match[str]) -> str:
        path, hash_, anchor = match[2].partition("#")
        target = outside_target(uri, path)
        if target is None:
            return match[0]
        return match[1] + posixpath.relpath(inside(target), posixpath.dirname(uri) or ".") + hash_ + anchor + match[3]

    parts, at = [], 0
    for block in FENCED.finditer(markdown):
        parts += [LINK.sub(local, markdown[at : block.start()]), block[0]]
        at = block.end()
    return "".join([*parts, LINK.sub(local, markdown[at:])])


def origin(uri: str) -> str:
    """The folder in the repository that a page's links start from."""
    if uri == "changelog.md":
        return "."
    top, _, rest = uri.partition("/")
    folder = {"source": posixpath.dirname(rest), "notebooks": "examples"}
    return folder.get(top, posixpath.join("docs", posixpath.dirname(uri)))


def outside_target(uri: str, link: str) -> str | None:
    """The path in the repository of a link's file, if it is not one that mkdocs finds by itself."""
    if not link or "://" in link:
        return None
    path, mine = posixpath.normpath(posixpath.join(origin(uri), link)), origin(uri).split("/")[0] == "docs"
    return path if (ROOT / path).exists() and not (mine and page_or_picture(path)) else None


def page_or_picture(path: str) -> bool:
    """Whether mkdocs itself puts a file of the repository into the site."""
    return path.startswith("docs/") and not path.endswith(".py")


def outside(uri: str, text: str) -> set[str]:
    """All of a page."""
    links = {match[2].partition("#")[0] for match in LINK.finditer(FENCED.sub("", text))}
    return {target for link in links if (target := outside_target(uri, link)) is not None}


def inside(target: str) -> str:
    """Where the site has a file of the repository."""
    if page_or_picture(target):
        return target.removeprefix("docs/")
    fixed = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", **notebooks.places()}
    if target in fixed:
        return fixed[target]
    if target.endswith((".png", ".svg")):
        return f"source/{target}"
    return f"source/{target}" if target.endswith(".md") else f"source/{target}.md"


def shown(target: str) -> str:
    """A page of a file's text, or of a folder's files."""
    path = ROOT / target
    if path.is_dir():
        names = sorted(one.name for one in path.iterdir() if one.is_file())
        lines = [f"- [{name}]({posixpath.join(os.path.basename(target), name)})" for name in names]
        return f"# {target}/\n\n" + "\n".join(lines) + "\n"
    text = path.read_text()
    if path.suffix == ".md":
        return text
    return f"# {target}\n\n~~~~{LANGUAGES.get(path.suffix, 'text')}\n{text}~~~~\n"
