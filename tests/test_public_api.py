"""What is public has changed only where that was meant: tests/public_api.txt is compared with what there is."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

from public_api import LISTING, MODULES, flags, listing
from test_docs import PUBLIC


def test_the_listing_is_what_there_is() -> None:
    committed = LISTING.read_text().splitlines()
    compared = difflib.unified_diff(committed, listing(), lineterm="", n=0)
    changed = [line for line in compared if not line.startswith(("---", "+++", "@@"))]
    assert not changed, (
        "what is public changed:\n" + "\n".join(changed) + "\n"
        "A line that went or changed breaks callers: keep it working and warn for one minor version (CONTRIBUTING.md, "
        "Versions), or raise the minor version. Then: PYTHONPATH=. python tests/public_api.py"
    )


def test_a_flag_is_listed_with_its_spellings_and_its_default() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", "--max-length", type=int, default=128)
    parser.add_argument("--towards", default=("sentences", "punctuation"))
    parser.add_argument("--out", type=Path, default=Path("evaluation"))
    parser.add_argument("--cache", type=Path, default=Path.home())
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed")
    parser.add_argument("--quiet", action="store_true")
    said = "--length/--max-length=128 --towards=sentences,punctuation --out=evaluation --cache --device --seed --quiet"
    assert list(flags("it", parser)) == [f"it {said}"]


def test_the_listing_has_the_modules_of_the_api_page() -> None:
    assert PUBLIC == MODULES
