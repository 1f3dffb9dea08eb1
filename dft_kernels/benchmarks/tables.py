"""Rows: one implementation in one case; their CSV, their table on the terminal, their table in the README."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from .implementations import OURS
from .problems import LOSSES, Case, Shape


@dataclass(frozen=True)
class Row:
    """One line of a CSV. Numbers that were not measured are nan, and empty in the file."""

    date: str
    commit: str
    machine: str
    python: str
    torch: str
    device: str
    n: int
    h: int
    v: int
    dtype: str
    loss: str
    part: str
    implementation: str
    package: str
    status: str  # ok, skipped, out of memory, failed, timed out
    reason: str
    rounds: int = 0
    ms: float = math.nan  # median over rounds
    ms_low: float = math.nan
    ms_high: float = math.nan
    floor_ms: float = math.nan
    over_floor: float = math.nan  # medians of ratios within a round
    over_floor_low: float = math.nan
    over_floor_high: float = math.nan
    over_eager: float = math.nan
    over_best_peer: float = math.nan
    peak_bytes: float = math.nan
    error_loss: float = math.nan  # relative, against float64
    error_dhidden: float = math.nan
    error_dweight: float = math.nan
    product_flops: float = math.nan  # of the machine in this run, a second
    copy_bytes: float = math.nan

    @property
    def case(self) -> Case:
        return Case(Shape(self.n, self.h, self.v), self.dtype, self.loss, self.part, self.device)

    @property
    def ours(self) -> bool:
        return self.implementation.startswith(OURS)

    def key(self) -> tuple[Any, ...]:
        """What a newer row replaces."""
        return (self.machine, self.case, self.implementation)


HEADER = [column.name for column in fields(Row)]


def read(path: Path) -> list[Row]:
    """The rows of a CSV that `write` made."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != HEADER:
            raise ValueError(
                f"bench: {path} must have the columns of dft-kernels bench ({', '.join(HEADER[:4])}, ...), got "
                f"{', '.join((reader.fieldnames or ['none'])[:4])}, .... Name another file."
            )
        kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": lambda text: float(text) if text else math.nan}
        convert = {column.name: kinds.get(str(column.type), str) for column in fields(Row)}
        return [Row(**{name: convert[name](text) for name, text in line.items()}) for line in reader]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a CSV; the file is never there in part."""

    def text(value: Any) -> Any:
        if isinstance(value, float):
            return "" if math.isnan(value) else f"{value:.6g}"
        return value

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, HEADER, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: text(value) for name, value in asdict(row).items()} for row in rows)
    os.replace(partial, path)


def write_json(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as a JSON list; what was not measured is null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(row).items()}
        for row in rows
    ]
    path.write_text(json.dumps(lines, indent=1) + "\n")


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All rows, the newer where two are of the same machine, case and implementation."""
    return list({row.key(): row for row in (*old, *new)}.values())


def by_case(rows: Iterable[Row]) -> list[tuple[Case, list[Row]]]:
    """Rows of each case, cases in the order of their first rows."""
    order = list(dict.fromkeys(row.case for row in rows))
    grouped = groupby(sorted(rows, key=lambda row: order.index(row.case)), key=lambda row: row.case)
    return [(case, list(group)) for case, group in grouped]


def number(value: float, form: str = ".2f", unit: str = "") -> str:
    """For a reader; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:{form}}{unit}"


def render(rows: list[Row]) -> list[Any]:
    """A rich table a case, and the reasons of what was not measured."""
    from rich.table import Table

    tables = []
    for case, group in by_case(rows):
        best = min((row.over_floor for row in group if row.status == "ok"), default=math.nan)
        table = Table(title=str(case), title_justify="left", caption_justify="left")
        headings = ["", "ms (low..high)", "x floor (low..high)", "x eager", "x best peer", "peak MB"]
        headings += ["error of loss", "dhidden", "dweight"]
        for heading in headings:
            table.add_column(heading, justify="right" if heading else "left")
        left_out = []
        for row in sorted(group, key=lambda row: (row.status != "ok", row.over_floor)):
            if row.status == "skipped":
                continue
            if row.status != "ok":
                left_out.append(f"{row.implementation}: {row.status}. {row.reason}")
            marks = ("[bold]" if row.ours else "") + ("[green]" if row.over_floor == best else "")
            table.add_row(
                marks + row.implementation,
                f"{number(row.ms, '.4g')} ({number(row.ms_low, '.4g')}..{number(row.ms_high, '.4g')})"
                if row.status == "ok"
                else row.status,
                f"{number(row.over_floor)} ({number(row.over_floor_low)}..{number(row.over_floor_high)})",
                number(row.over_eager),
                number(row.over_best_peer),
                number(row.peak_bytes / 1e6, ".0f"),
                number(row.error_loss, ".0e"),
                number(row.error_dhidden, ".1e"),
                number(row.error_dweight, ".1e"),
            )
        floor = [row.floor_ms for row in group if row.status == "ok"]
        caption = f"floor: {case.products()} products, {min(floor):.4g}..{max(floor):.4g} ms" if floor else ""
        table.caption = "\n".join([caption, *left_out])
        tables.append(table)
    return tables


def brief(rows: list[Row]) -> Any:
    """A rich table with one line a case: our fastest against the floor, eager, and the fastest peer."""
    from rich.table import Table

    table = Table()
    for heading in ("case", "ours", "ms", "x floor", "x eager", "x best peer", "best peer", "MB", "least MB of peers"):
        table.add_column(heading, justify="left" if heading in ("case", "ours", "best peer") else "right")
    for case, group in by_case(rows):
        done = [row for row in group if row.status == "ok"]
        mine, others = (sorted((r for r in done if r.ours is o), key=lambda r: r.ms) for o in (True, False))
        if mine:
            ours, least = mine[0], min((row.peak_bytes for row in others), default=math.nan)
            table.add_row(
                str(case), ours.implementation.removeprefix(OURS), number(ours.ms, ".4g"), number(ours.over_floor),
                number(ours.over_eager), number(ours.over_best_peer), others[0].implementation if others else "–",
                number(ours.peak_bytes / 1e6, ".0f"), number(least / 1e6, ".0f"),
            )  # fmt: skip
        else:
            reasons = "; ".join(f"{row.implementation}: {row.status}" for row in group if row.ours)
            table.add_row(str(case), reasons or "–")
    return table


def skipped(rows: Iterable[Row]) -> list[str]:
    """Who was not measured, and why, each once."""
    lines = [f"{row.implementation}: not measured, {row.reason}" for row in rows if row.status == "skipped"]
    return list(dict.fromkeys(lines))


def markdown(rows: list[Row], shape: Shape, dtype: str) -> str:
    """The README's table: time over the floor and peak memory of every implementation, a column a loss."""
    rows = [row for row in rows if row.case.shape == shape and row.dtype == dtype and row.part == "both"]
    if not rows:
        raise ValueError(f"bench: the CSV must have rows of {shape} in {dtype}, got none. Measure them first.")
    losses = [loss for loss in LOSSES if any(row.loss == loss for row in rows)]
    names = list(dict.fromkeys(row.implementation for row in rows if row.status != "skipped"))
    cells = {(row.implementation, row.loss): row for row in rows}

    def cell(name: str, loss: str) -> str:
        row = cells.get((name, loss))
        if row is None or row.status == "skipped":
            return ""
        if row.status != "ok":
            return row.status
        return f"{row.over_floor:.2f}, {row.peak_bytes / 1e6:.0f} MB"

    lines = [
        "| " + " | ".join([f"{shape}, {dtype}", *(LOSSES[loss].title for loss in losses)]) + " |",
        "|---" * (len(losses) + 1) + "|",
        *("| " + " | ".join([name, *(cell(name, loss) for loss in losses)]) + " |" for name in names),
    ]
    first = rows[0]
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    return "\n".join(lines) + f"\n\n{first.machine}; torch {first.torch}; commit {commits}; {first.date}."
