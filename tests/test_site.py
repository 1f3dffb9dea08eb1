"""The site of docs/: what `make docs` builds is whole, loads nothing from elsewhere, and is readable on a phone."""

from __future__ import annotations

import fcntl
import html
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import chromium
import pytest
import yaml
from test_docs import PUBLIC

import dft_kernels

ROOT = Path(dft_kernels.__file__).parent.parent


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once, by whichever of the test processes comes first, as `make docs` does."""
    at = tmp_path_factory.getbasetemp()
    at = (at.parent if "PYTEST_XDIST_WORKER" in os.environ else at) / "site"
    with at.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not at.exists():
            part = at.with_suffix(".part")
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(part)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stdout + done.stderr
            assert not done.stdout + done.stderr
            part.rename(at)
    return at


def pages(entries: list[Any]) -> list[str]:
    """Of a navigation, in its order."""
    found = []
    for entry in entries:
        (value,) = entry.values()
        found += [value] if isinstance(value, str) else pages(value)
    return found


def test_the_navigation_has_every_page() -> None:
    nav = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len(nav) == len(set(nav))
    written = {path.name for path in (ROOT / "docs").glob("*.md")}
    made = {f"notebooks/{path.stem}.md" for path in (ROOT / "examples").glob("*.ipynb")}
    assert set(nav) == written | made | {"changelog.md"}
    assert nav[0] == "index.md"


class Read(HTMLParser):
    """What a page loads, links to, and has as anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.headings = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.headings += tag == "h1"
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        if tag == "a":
            self.links += [given["href"] or ""] if "href" in given else []
            return
        if tag == "link" and given.get("rel") in ("canonical", "prev", "next"):
            return
        self.loads += [
            value for name in ("src", "href", "data", "poster", "srcset", "action") if (value := given.get(name))
        ]


@pytest.fixture(scope="session")
def read(site: Path) -> dict[Path, Read]:
    """Every page."""
    return {path: Read(path.read_text()) for path in site.rglob("*.html")}


def test_every_page_is_there(site: Path, read: dict[Path, Read]) -> None:
    names = {path.relative_to(site).as_posix() for path in read}
    wanted = {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} | {"changelog.html", "404.html"}
    wanted |= {f"notebooks/{path.stem}.html" for path in (ROOT / "examples").glob("*.ipynb")}
    wanted |= {f"reference/{module}.html" for module in PUBLIC}
    assert names >= wanted
    assert {name for name in names - wanted if not name.startswith("source/")} == set()
    assert {path.name: found.headings for path, found in read.items() if found.headings != 1} == {}


def test_links_and_anchors_lead_somewhere_within_the_site(site: Path, read: dict[Path, Read]) -> None:
    broken = []
    for path, found in read.items():
        if path.name == "404.html":  # served for any address, so that its links begin at the server's root
            continue
        for link in {*found.links, *found.loads}:
            url = urlsplit(link)
            if url.scheme in ("http", "https", "mailto", "data"):
                continue
            there = (path.parent / unquote(url.path)).resolve() if url.path else path
            if there.is_dir():
                there /= "index.html"
            anchors = read[there].anchors if there in read else {url.fragment}
            if not there.is_relative_to(site.resolve()) or not there.exists() or url.fragment not in {"", *anchors}:
                broken.append((path.name, link))
    assert not broken


def test_nothing_is_loaded_from_elsewhere(site: Path, read: dict[Path, Read]) -> None:
    """By the pages and their styles; what the theme's script could load if a page had a diagram is in no page."""
    elsewhere = re.compile(r"^\s*(?:https?:)?//")
    assert {load for found in read.values() for load in found.loads if elsewhere.match(load)} == set()
    for path in read:
        text = re.sub(r"<(code|pre)\b.*?</\1>", "", path.read_text(), flags=re.S)
        assert "mermaid" not in text, path
        assert not re.search(r"@import|url\(\s*[\"']?(?:https?:)?//", text), path
    for path in site.rglob("*.css"):
        assert not re.search(r"@import\s|url\(\s*[\"']?(?:https?:)?//", path.read_text()), path


@pytest.mark.parametrize("module", PUBLIC)
def test_the_reference_has_every_docstring(site: Path, read: dict[Path, Read], module: str) -> None:
    path = site / "reference" / f"{module}.html"
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", path.read_text())).split())
    assert not re.search(r"\\[<_*\[\]#|&]", text)  # an escape that was shown
    for name in import_module(module).__all__:
        assert name.lower() in read[path].anchors, name
        doc = getattr(import_module(module), name).__doc__
        if callable(getattr(import_module(module), name)):
            words = re.findall(r"\w{3,}", doc)
            missing = [word for word in words if word not in text]
            assert not missing, (name, missing)


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """The site's address on this machine."""

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


SEARCH = """new Promise(done => {
  document.querySelector("label[for=__search]").click();
  const field = document.querySelector("[data-md-component=search-query]");
  field.focus(); field.value = "jensen_shannon"; field.dispatchEvent(new Event("keyup", {bubbles: true}));
  const look = () => { const found = document.querySelectorAll(".md-search-result__item a");
    found.length ? done([...found].map(one => one.getAttribute("href"))) : setTimeout(look, 50); };
  look(); })"""


@pytest.mark.skipif(chromium.FOUND is None, reason="no chromium and no chrome on PATH")
def test_in_a_browser(site: Path, served: str, tmp_path: Path) -> None:
    """On a phone and a desk, light and dark: nothing is asked of another host, no page is wider than the screen, no
    script fails; and the search finds a divergence."""
    with chromium.browser(tmp_path / "profile", 120) as page:
        wide = ("loss", "performance", "reference/dft_kernels")
        for width, dark, names in ((360, False, ("index", *wide)), (360, True, ("index",)), (1280, True, ("index",))):
            for name in names:
                page.show(site / f"{name}.html", width, dark=dark)
                asked = {of["request"]["url"] for kind, of in page.events if kind == "Network.requestWillBeSent"}
                assert all(url.startswith(("file:", "data:")) for url in asked), asked
                assert page.value("document.documentElement.scrollWidth") <= width, (name, width)
                ground = page.value("getComputedStyle(document.body).backgroundColor")
                assert (min(map(int, re.findall(r"\d+", ground)[:3])) < 128) == dark, ground
        page.events.clear()
        page.ask("Page.navigate", url=f"{served}/index.html")
        while not any(kind == "Page.loadEventFired" for kind, _ in page.events):
            page.message()
        found = page.ask("Runtime.evaluate", expression=SEARCH, awaitPromise=True, returnByValue=True)["result"][
            "value"
        ]
        assert any("loss.html" in link for link in found), found
        asked = {of["request"]["url"] for kind, of in page.events if kind == "Network.requestWillBeSent"}
        assert all(url.startswith((served, "data:", "blob:")) for url in asked), asked
        assert not [of for kind, of in page.events if kind == "Runtime.exceptionThrown"]
