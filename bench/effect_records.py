"""What the study of docs/effect.md keeps for good: a file a run that was tested, and what validation chose.

A run takes a model of half a gigabyte and some core minutes, and leaves 200 texts and 1,500 answers. Those are kept,
so that the study adds up over machines, and anyone can compare again what was drawn once.
"""

from __future__ import annotations

import ast
import csv
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from effect_arms import BATCH, BY_NAME, COUNT, LENGTH, PROMPT, QUESTIONS, RATE, SFT, TASKS, WARMUP, Arm

from dft_kernels.benchmarks.runs import about
from dft_kernels.evaluation.results import Swept, Value
from dft_kernels.files import Source, replace_text
from dft_kernels.generation.sampling import Sampling

Kept = TypeVar("Kept", "Record", "Validation")
FIRST = 10  # prompts, the first, whose texts the page shows


@dataclass(frozen=True)
class Record:
    """A run. registered: its arm and the study's sizes, as they were; how: temperature, top_p, min_p and steps at
    inference; texts: after the test's prompts, cut to the length of the human ones; right: by task, a digit a question,
    1 for a right answer; values: of all metrics; cost: of the drawing, as `results.Evaluated` has it; made: date,
    commit, machine, versions. Of a trained model, held_out: cross-entropy of held-out training text; trained: its
    losses, as Trainer logged them every tenth step; of an arm's first, expected: `effect_expected` on the validation
    novel."""

    registered: dict[str, Any]
    seed: int
    how: dict[str, Any]
    held_out: float | None
    trained: list[dict[str, float]]
    expected: dict[str, float]
    texts: list[str]
    right: dict[str, str]
    values: list[Value]
    cost: dict[str, float]
    made: dict[str, Any]


@dataclass(frozen=True)
class Validation:
    """sampling: of those in `sweep`, the one by which SFT wrote nearest to people on the validation novel."""

    registered: dict[str, Any]
    sampling: Sampling
    sweep: list[Swept]
    made: dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """The first prompts of the test, and what their author wrote after them."""

    prompts: list[str]
    texts: list[str]


def registered(arm: Arm) -> dict[str, Any]:
    """All that a run of an arm depends on, but for its seed and the code."""
    sizes = {"batch": BATCH, "length": LENGTH, "warmup": WARMUP, "rate": RATE, "prompt": PROMPT, "count": COUNT}
    its = {key: getattr(arm, key) for key in ("name", "flags", "steps", "text", "model", "of", "sampled", "refined")}
    found: dict[str, Any] = json.loads(json.dumps({**its, **sizes, "tasks": arm.tasks, "questions": QUESTIONS}))
    return found


class Records:
    """A folder of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, arm: Arm, seed: int) -> Record | None:
        """Of a run, None where it was not tested yet."""
        return self._read(Record, f"{_plain(arm.name)}-{seed}", arm)

    def validation(self) -> Validation | None:
        """Of the sweep, None where it was not made yet."""
        return self._read(Validation, "validation", BY_NAME[SFT])

    def keep(self, arm: Arm, seed: int, **found: Any) -> None:
        """Write a run's."""
        self._write(f"{_plain(arm.name)}-{seed}", Record(registered(arm), seed, made=about("cpu"), **found))

    def keep_validation(self, sampling: Sampling, sweep: list[Swept]) -> None:
        """Write the sweep's."""
        self._write("validation", Validation(registered(BY_NAME[SFT]), sampling, sweep, about("cpu")))

    def shown(self) -> Shown | None:
        """The first of the test's prompts, None before `prepare`."""
        source = Source("effect", self.folder / "shown.json", "Run prepare again")
        return source.record(Shown, source.json(1 << 24)) if source.path.exists() else None

    def keep_shown(self, one: Shown) -> None:
        """Write these."""
        self._write("shown", one)

    def measured_costs(self) -> list[dict[str, str]]:
        """The rows that `cost` has written."""
        file = self.folder / "cost.csv"
        if not file.exists():
            return []
        with file.open(newline="") as opened:
            return list(csv.DictReader(opened))

    def costs(self, column: str = "step_s") -> dict[str, float]:
        """A column of these over SFT's, median over rounds; an entry an arm."""
        by = {(row["arm"], row["round"]): float(row[column]) for row in self.measured_costs()}
        return {
            arm: statistics.median(by[arm, turn] / by[SFT, turn] for name, turn in by if name == arm)
            for arm in dict.fromkeys(name for name, _ in by)
        }

    def _read(self, kind: type[Kept], name: str, arm: Arm) -> Kept | None:
        file = self.folder / f"{name}.json"
        if not file.exists():
            return None
        source = Source("effect", file, "Name another --kept, or restore the file")
        found = source.record(kind, source.json(1 << 24))
        if found.registered != (now := registered(arm)):
            differ = [key for key in now if now[key] != found.registered.get(key)]
            source.fail("registered", "be as bench/effect_arms.py is", f"another {', '.join(differ)}")
        return found

    def _write(self, name: str, one: Record | Validation | Shown) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / f"{name}.json", json.dumps(asdict(one), indent=1, ensure_ascii=False) + "\n")


def logged(file: Path) -> list[dict[str, float]]:
    """All that Trainer printed at each log of the training loss; where a stopped run took steps again, the last."""
    lines = [ast.literal_eval(line) for line in file.read_text().splitlines() if line.startswith("{'loss'")]
    numbers = [{name: float(value) for name, value in line.items()} for line in lines]
    return list({one["epoch"]: one for one in numbers}.values())


def losses(logs: list[dict[str, float]]) -> list[dict[str, float]]:
    """What a record keeps of these: nothing of the machine's, nor of the schedule's."""
    kept = re.compile(r"(hard_loss|grad_norm|entropy|term_.*|rollout_.*)")
    return [{name: value for name, value in one.items() if kept.fullmatch(name)} for one in logs]


def known(records: Sequence[Record], control: Sequence[Record]) -> dict[str, Any]:
    """Of an arm's runs, held-out cross-entropy and the percentages of right answers, means over seeds; retention:
    points of the mean over tasks that it lies above the control's models, and the standard error of that, of the
    questions in pairs."""
    held_out = [one.held_out for one in records if one.held_out is not None]
    out: dict[str, Any] = {"held_out": float(np.mean(held_out)) if held_out else ""}
    mine, theirs = _answers(records), _answers(control)
    apart = [mine[task] - theirs[task] for task in mine if task in theirs]
    out |= {task: 100 * float(mine[task].mean()) if task in mine else "" for task in TASKS}
    out["retention"] = 100 * float(np.mean([one.mean() for one in apart])) if apart else ""
    errors = [one.var(ddof=1) / len(one) for one in apart]
    out["retention_error"] = 100 * float(np.sqrt(np.sum(errors))) / len(apart) if apart else ""
    return out


def _answers(records: Sequence[Record]) -> dict[str, Any]:
    """By task, the share of runs that answered each question rightly [questions]."""
    tasks = dict.fromkeys(task for one in records for task in one.right)
    return {task: np.mean([[int(mark) for mark in one.right[task]] for one in records], 0) for task in tasks}


def _plain(name: str) -> str:
    """Of an arm, in the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
