"""What is kept of the study of docs/effect.md so far, before all of it is there to be compared: the page's table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from effect_arms import ARMS, NAMED, TASKS
from effect_records import Records, known
from markdown_tables import where


def drawn_table() -> tuple[list[str], list[list[str]], str]:
    """A row an arm."""
    kept, lines, made = Records(Path(__file__).parent / "results" / "effect"), [], []
    for arm in ARMS:
        found = [one for seed in range(arm.seeds) if (one := kept.run(arm, seed)) is not None]
        if not arm.tested or not found:
            continue
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


TABLES = {"drawn": drawn_table}
