"""The texts of the presets: each fetched by a package's name, read into plain paragraphs.

Debian packages come by `apt-get download` (no root, nothing installed) in the version of the machine's suite, which
the target's `source` records with the package's sha256. Where there is no apt, a .deb of that name that lies in the
cache folder is used as it is.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from .models import COQA, LAMBADA, coqa, lambada


class Recipe(NamedTuple):
    """Where a preset's text comes from. shipped: its licence lets the statistics be in the package."""

    source: str
    licence: str
    package: str | None  # of Debian; None: what `read` fetches itself
    read: Callable[[Path], Iterator[str]]  # of the unpacked package (or the cache folder): documents
    shipped: bool = True


def unwrapped(text: str) -> str:
    """Paragraphs, each on a line of its own, with a blank line between them."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def _austen(folder: Path) -> Iterator[str]:
    """R's lazy-load database: for each novel a length, then a zlib stream of a serialized vector of strings."""
    data = (folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while data:
        stream = zlib.decompressobj()
        whole = stream.decompress(data[4:])
        data = stream.unused_data
        at = 18 + struct.unpack(">i", whole[14:18])[0]  # behind the header and the name of the encoding
        (count,) = struct.unpack(">i", whole[at + 4 : at + 8])
        at += 8
        lines = []
        for _ in range(count):
            (length,) = struct.unpack(">i", whole[at + 4 : at + 8])
            lines.append(whole[at + 8 : at + 8 + length].decode())
            at += 8 + length
        yield unwrapped("\n".join(lines))


def _sword(folder: Path) -> Iterator[str]:
    """A SWORD module: blocks of OSIS markup, compressed; an index of offset, size and length of each."""
    for index in sorted([*folder.rglob("*.czs"), *folder.rglob("*.bzs")], reverse=True):  # ot, nt
        data = index.with_suffix(index.suffix[:-1] + "z").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index.read_bytes()):
            text = zlib.decompress(data[offset : offset + size]).decode() if size else ""
            text = re.sub(r"<note\b.*?</note>", "", text, flags=re.S)
            text = re.sub(r"</?(div|title|chapter|p)\b[^>]*>", "\n\n", text)
            text = html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"</?(l|lg|lb)\b[^>]*>", " ", text)))
            if text.strip():
                yield unwrapped(text)


def _devil(folder: Path) -> Iterator[str]:
    text = gzip.decompress((folder / "usr/share/dictd/devil.dict.dz").read_bytes()).decode("latin-1")
    yield unwrapped(text[text.index("\nABASEMENT") :])


def _jargon(folder: Path) -> Iterator[str]:
    """The definitions: without the front matter, headwords, and the braces that mark cross-references."""
    text = gzip.decompress((folder / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode()
    text = unwrapped(text[text.index("\n   :") :]).replace("{", "").replace("}", "")
    yield "\n\n".join(part for part in text.split("\n\n") if not part.startswith(":")) + "\n"


class _Paragraphs(HTMLParser):
    """The text of a page's <div class="para">, without the listings in them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.divs: list[bool] = []  # open ones: whether each is a paragraph
        self.listing = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div":
            self.divs.append(dict(attrs).get("class") == "para")
            self.parts.append("\n\n")
        self.listing += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self.divs:
            self.divs.pop()
            self.parts.append("\n\n")
        self.listing -= tag == "pre"

    def handle_data(self, data: str) -> None:
        if self.divs and self.divs[-1] and not self.listing:
            self.parts.append(data)


def _handbook(folder: Path) -> Iterator[str]:
    for page in sorted((folder / "usr/share/doc/debian-handbook/html/en-US").glob("*.html")):
        paragraphs = _Paragraphs()
        paragraphs.feed(page.read_text(encoding="utf-8"))
        text = unwrapped("".join(paragraphs.parts))
        if text.strip():
            yield text


def _copyright(folder: Path) -> Iterator[str]:
    """The chapters: the blocks of a page that end as sentences do, which its links and headings do not."""
    for number in range(1, 18):
        page = (folder / f"usr/share/doc/cfi-en/html/ch{number}web.htm").read_text(encoding="cp1252", errors="replace")
        page = re.sub(r"<title>.*?</title>", "", page, flags=re.S | re.I)
        page = re.sub(r"</?(p|center|tr|td|table|div|ul|ol|li|h\d|blockquote)\b[^>]*>", "\n\n", page, flags=re.I)
        parts = unwrapped(html.unescape(re.sub(r"<[^>]*>", "", page))).split("\n\n")
        ended = [part for part in parts if len(part) > 60 and re.search(r"[.!?…][\"'”’)]*\s*$", part)]
        yield "\n\n".join(ended) + "\n"


RECIPES: dict[str, Recipe] = {
    "literary": Recipe("six novels of Jane Austen, 1811-1818", "public domain", "r-cran-janeaustenr", _austen),
    "sermon": Recipe(
        "The Treasury of David, C. H. Spurgeon, 1869-1885: expositions and sermons",
        "public domain",
        "sword-comm-tdavid",
        _sword,
    ),
    "scripture": Recipe("the King James Version, 1611-1769", "public domain outside the UK", "sword-text-kjv", _sword),
    "scripture-modern": Recipe("the World English Bible", "public domain", "sword-text-web", _sword),
    "satire": Recipe("The Devil's Dictionary, Ambrose Bierce, 1911", "public domain", "dict-devil", _devil),
    "reference": Recipe("the Jargon File 4.4.7, 2003", "public domain", "jargon-text", _jargon),
    "reportage": Recipe(
        "Copyright Does Not Exist, Linus Walleij, 1998: on the culture of hackers",
        "public domain",
        "cfi-en",
        _copyright,
    ),
    "technical": Recipe(
        "The Debian Administrator's Handbook, Raphaël Hertzog and Roland Mas",
        "GPL-2+ or CC-BY-SA-3.0 (the text; these are counts of it)",
        "debian-handbook",
        _handbook,
    ),
    "fiction": Recipe(
        f"LAMBADA, passages of recent novels (arXiv:1606.06031), of {LAMBADA.package} {LAMBADA.version}",
        f"{LAMBADA.licence}; that of the novels is not stated",
        None,
        lambda cache: iter(lambada(cache)),
        shipped=False,
    ),
    "conversational": Recipe(
        f"CoQA, questions and answers of two people about a story (arXiv:1808.07042), of {COQA.package} {COQA.version}",
        f"{COQA.licence}; that of the dialogues is not stated, their stories have several",
        None,
        lambda cache: ("\n\n".join(said for turn in one.turns for said in turn) + "\n" for one in coqa(cache)),
        shipped=False,
    ),
}


def documents_of(name: str, cache: Path) -> tuple[str, list[str]]:
    """Source (with the package's version and sha256) and documents of a preset's text."""
    if name not in RECIPES:
        raise ValueError(f"target: presets must be of {', '.join(RECIPES)}, got {name!r}. Name some, or none for all.")
    recipe = RECIPES[name]
    if recipe.package is None:
        return recipe.source, list(recipe.read(cache))
    with tempfile.TemporaryDirectory() as scratch:
        deb = _deb(recipe.package, cache)
        done = _run(["dpkg-deb", "-x", str(deb), scratch], Path(scratch))
        if done is not None:
            raise RuntimeError(f"target: {deb.name} must be unpacked by dpkg-deb, got: {done}. Delete it and repeat.")
        digest = hashlib.sha256(deb.read_bytes()).hexdigest()
        return f"{recipe.source} (Debian's {deb.name}, sha256 {digest})", list(recipe.read(Path(scratch)))


def _deb(package: str, cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    pattern = f"{package}_*.deb"
    found = sorted(cache.glob(pattern))
    if not found:
        problem = _run(["apt-get", "-q", "download", package], cache)
        found = sorted(cache.glob(pattern))
        if problem is not None or not found:
            raise RuntimeError(
                f"target: {package} must be downloaded once, got: {problem}. Check the network, or put Debian's "
                f"{package}_VERSION_all.deb into the cache folder (--cache)."
            )
    return found[-1]


def _run(command: list[str], folder: Path) -> str | None:
    """What went wrong, None where nothing did."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason given"])[-1]
