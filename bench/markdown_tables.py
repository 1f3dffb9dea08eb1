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
    """Machine, torch and commit of rows that were measured on one machine."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"{rows[0]['machine']}; torch {rows[0]['torch']}; commit {commits}"
