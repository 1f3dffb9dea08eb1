"""Any text inside Markdown: on one line, and nothing of it read as markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def plain(text: object) -> str:
    """On one line, nothing of it markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(str(text).split()))


def ticks(text: str) -> int:
    """The longest run of them."""
    return max(map(len, re.findall("`+", text)), default=0)


def code(text: object) -> str:
    """On one line, in as many ticks as it needs; a table ends at a | in them too."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    fence, edge = "`" * (1 + ticks(line)), " " if line[:1] == "`" or line[-1:] == "`" else ""
    return f"{fence}{edge}{line}{edge}{fence}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells that are Markdown already."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))
