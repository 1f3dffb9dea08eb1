"""What the study of docs/effect.md shows beside its comparisons: what the terms come to on people's text and on a
model's own, what a step costs, and texts."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from effect_arms import ARMS, SFT, Arm
from effect_records import FIRST, Record, Records
from markdown_tables import where

KEPT = Records(Path(__file__).parent / "results" / "effect")
COSINE = "cosine"  # in a training's logs
Table = tuple[list[str], list[list[str]], str]


def drawn() -> Iterator[tuple[Arm, list[Record]]]:
    """The arms that are drawn, each with its runs."""
    for arm in ARMS:
        found = [one for seed in range(arm.seeds) if (one := KEPT.run(arm, seed)) is not None]
        if arm.tested and found:
            yield arm, found


def read() -> Table:
    """What the terms come to on people's text: a row an arm."""
    of = {arm.name: found[0].expected for arm, found in drawn() if found[0].expected}
    terms = list(dict.fromkeys(term for its in of.values() for term in its))
    lines = [[name, *(f"{its[term]:.2f}" for term in terms)] for name, its in of.items()]
    said = "J of each term, of what the model expects on people's text, over what as much of that text itself comes to"
    return ["model", *(f"`{term}`" for term in terms)], lines, f"{said}: the validation novel, the first seed's models"


def own() -> Table:
    """What the terms came to on the text that an arm wrote while it was trained: a row an arm."""
    of = {arm.name: [_after("rollout_", record.trained) for record in found] for arm, found in drawn()}
    of = {name: runs for name, runs in of.items() if any(any(logs) for logs in runs)}
    first, last, whole = (
        {name: _means([one for logs in runs for one in logs[part]]) for name, runs in of.items()}
        for part in (slice(3), slice(-3, None), slice(None))
    )
    terms = [term for term in dict.fromkeys(term for its in first.values() for term in its) if term != COSINE]
    lines = []
    for name, its in whole.items():
        cells = (
            f"{1000 * first[name][term]:.3g} → {1000 * last[name][term]:.3g}" if term in its else "" for term in terms
        )
        lines.append([name, *cells, f"{its[COSINE]:.2f}" if COSINE in its else ""])
    said = (
        "J in thousandths, means of the first thirty steps and of the last thirty, over the seeds; cosine: between the "
        "gradients of two halves of a step's texts, mean over all steps"
    )
    return ["trained", *(f"`{term}`" for term in terms), "cosine of halves"], lines, said


def _after(prefix: str, logs: list[dict[str, float]]) -> list[dict[str, float]]:
    """What is logged under a prefix."""
    return [
        {name.removeprefix(prefix): value for name, value in one.items() if name.startswith(prefix)} for one in logs
    ]


def _means(logs: list[dict[str, float]]) -> dict[str, float]:
    """Of every number, over the logs that have it."""
    names = dict.fromkeys(name for one in logs for name in one)
    return {name: float(np.mean([one[name] for one in logs if name in one])) for name in names}


def cost() -> Table:
    """Time and memory of a step: a row an arm."""
    rows = KEPT.measured_costs()
    of = [KEPT.costs(column) for column in ("step_s", "mean_s", "peak_gb")]
    lines = [[arm, *(f"{its[arm]:.2f}" for its in of)] for arm in of[0]]
    head = ["arm", "a step without rollouts", "all steps", "peak memory"]
    first = [row for row in rows if row["arm"] == SFT]
    seconds, gigabytes = (np.median([float(row[column]) for row in first]) for column in ("step_s", "peak_gb"))
    said = f"Over SFT's, {seconds:.2f} s and {gigabytes:.2f} GB; of each round, medians of {len(first)}"
    return head, lines, f"{said}; {where(rows)}"


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


TABLES = {"read": read, "own": own, "cost": cost, "texts": texts}
