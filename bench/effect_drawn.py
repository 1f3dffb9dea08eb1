"""What is kept of the study of docs/effect.md before all of it is there to be compared: distances, and texts."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from effect_arms import ARMS, NAMED, TASKS, Arm
from effect_records import FIRST, Record, Records, known
from markdown_tables import where

KEPT = Records(Path(__file__).parent / "results" / "effect")
Table = tuple[list[str], list[list[str]], str]


def drawn() -> Iterator[tuple[Arm, list[Record]]]:
    """The arms that are drawn, each with its runs."""
    for arm in ARMS:
        found = [one for seed in range(arm.seeds) if (one := KEPT.run(arm, seed)) is not None]
        if arm.tested and found:
            yield arm, found


def distances() -> Table:
    """A row an arm."""
    lines, made = [], []
    for arm, found in drawn():
        of = [{value.metric: value for value in one.values} for one in found]
        floors = (np.mean([abs(its[name].value / its[name].floor) for its in of]) for name in NAMED)
        its = known(found, [])
        trained, *right = (its[name] for name in ("held_out", *TASKS))
        numbers = [trained and f"{trained:.3f}", *(share and f"{share:.1f}" for share in right)]
        lines.append([arm.name, str(len(found)), *(f"{mean:.2f}" for mean in floors), *numbers])
        made += [one.made for one in found]
    head = ["drawn", "seeds", *NAMED, "cross-entropy, nats", *TASKS]
    said = "Distances in floors, means over the seeds that are drawn; cross-entropy of held-out training text; right "
    return head, lines, f"{said}answers in %; {where(made)}"


def texts() -> Table:
    """The first texts of every arm's first seed, and what was written by the author; a row a text."""
    shown = KEPT.shown()
    assert shown is not None
    of = {"the author": shown.texts} | {arm.name: found[0].texts for arm, found in drawn() if not arm.sampled}
    lines = []
    for number, prompt in enumerate(shown.prompts):
        lines.append([f"**{number + 1}**", f"**{_plain(prompt)}**"])
        lines += [[name, _plain(its[number])] for name, its in of.items()]
    return ["", "text"], lines, f"The first {FIRST} prompts of the test, bold, and what follows them"


def _plain(text: str) -> str:
    """As it is, in a cell of a table, whatever a page would make of it."""
    text = html.escape(text, quote=False)
    for mark in "|*_`[]~\\":
        text = text.replace(mark, f"&#{ord(mark)};")
    return "<br>".join(text.strip().splitlines())


TABLES = {"distances": distances, "texts": texts}
