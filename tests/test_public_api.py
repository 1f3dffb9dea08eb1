"""What is public has changed only where that was meant: tests/public_api.txt is compared with what there is."""

from __future__ import annotations

import difflib

from public_api import LISTING, MODULES, listing
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


def test_the_listing_has_the_modules_of_the_api_page() -> None:
    assert PUBLIC == MODULES
