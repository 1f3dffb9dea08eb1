"""What every table of the pages is made by."""

from __future__ import annotations

from collections.abc import Iterable

Rows = list[dict[str, str]]


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]], caption: str) -> str:
    """A table and a line below it."""
    head = list(head)
    table = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table) + f"\n\n{caption}."


def where(rows: Rows) -> str:
    """Machines, torch and commits of rows."""
    machines, commits = (", ".join(dict.fromkeys(row[of] for row in rows)) for of in ("machine", "commit"))
    return f"{machines}; torch {rows[0]['torch']}; commit {commits}"
