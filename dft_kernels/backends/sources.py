"""What each compiled extension is made of. setup.py runs this file alone, before there is a torch or a package: nothing
of either is imported here."""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDERS = {"_C": ("common", "cpu"), "_cuda": ("common", "cuda")}  # of csrc
_SUFFIXES = {".cpp", ".cu", ".cuh", ".h"}  # what a compiler reads, and no editor's leftovers


def sources(root: Path, name: str) -> list[Path]:
    """The files of the extension `name` below `root`, none where there is no csrc, as beside a wheel."""
    found = (path for folder in FOLDERS[name] for path in (root / "csrc" / folder).rglob("*"))
    return sorted(path for path in found if path.suffix in _SUFFIXES)


def digest(root: Path, name: str) -> str | None:
    """What tells these files apart from others of the same names, None where there are none."""
    whole = hashlib.sha256()
    found = sources(root, name)
    for path in found:
        text = path.read_bytes()
        whole.update(f"{path.relative_to(root).as_posix()} {len(text)}\n".encode() + text)
    return whole.hexdigest()[:16] if found else None
