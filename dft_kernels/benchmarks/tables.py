"""Rows: one implementation in one case; their CSV, their table on the terminal, their table in the README."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files import Source, shown
from . import problems
from .implementations import NARROW, OURS
from .problems import LOSSES, PARTS, RANDOM, REAL, Case, Shape
from .worker import FAILED, OK, OUT_OF_MEMORY, SKIPPED, SLOWER, TIMED_OUT


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
    floor_dtype: str = ""  # of the bare products: the inputs', or float32 where that is the faster
    over_floor: float = math.nan  # medians of ratios within a round
    over_floor_low: float = math.nan
    over_floor_high: float = math.nan
    over_eager: float = math.nan
    over_best_peer: float = math.nan
    peak_bytes: float = math.nan
    error_loss: float = math.nan  # relative, against float64
    error_dhidden: float = math.nan
    error_dweight: float = math.nan
    error_rows: int = 0  # rows of the problem that errors are of: all N, or fewer where float64 is dear
    product_flops: float = math.nan  # of the machine in this run, a second
    copy_bytes: float = math.nan
    inputs: str = RANDOM
    distance: float = 0.0  # of the teacher, as it was asked for; 0: not at all
    teacher_kl: float = math.nan  # what it is, in float64

    @property
    def case(self) -> Case:
        shape = Shape(self.n, self.h, self.v)
        return Case(shape, self.dtype, self.loss, self.part, self.device, self.inputs, self.distance)

    @property
    def ours(self) -> bool:
        return self.implementation.startswith(OURS) or self.implementation == NARROW

    def key(self) -> tuple[Any, ...]:
        """What a newer row replaces."""
        return (self.machine, self.case, self.implementation)


MAIN = f"{OURS}native"  # what a call takes by itself on a CPU
HEADER = [column.name for column in fields(Row)]
CSV_LIMIT = 1 << 24  # bytes
REASON = 300  # characters of one that are printed
_NUMBER = {"int": re.compile(r"[0-9]{1,15}"), "float": re.compile(r"-?([0-9]+(\.[0-9]+)?(e[+-]?[0-9]{1,3})?|inf)")}
_DTYPES = ("bfloat16", "float16", "float32")
_CHOICES = {
    "device": ("cpu", "cuda"),
    "dtype": _DTYPES,
    "floor_dtype": ("", *_DTYPES),
    "loss": tuple(LOSSES),
    "part": PARTS,
    "inputs": (RANDOM, *REAL),
    "status": (OK, SKIPPED, OUT_OF_MEMORY, FAILED, TIMED_OUT),
}


def read(path: Path) -> list[Row]:
    """The rows of a CSV that `write` made. ValueError, by file, line and column, for what it does not write."""
    file = Source("bench", path, "Name another file, or restore it")
    reader = csv.reader(io.StringIO(file.text(CSV_LIMIT), newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = next(reader, ["none"])
        if header != HEADER:
            columns = f"have the columns of dft-kernels bench ({', '.join(HEADER[:4])}, ...)"
            file.fail("the file", columns, f"{', '.join(map(shown, header[:4]))}, ...")
        for cells in reader:
            where = f"line {reader.line_num}"
            if len(cells) != len(HEADER):
                file.fail(where, f"have {len(HEADER)} cells", len(cells))
            values = {}
            for column, text in zip(fields(Row), cells, strict=True):
                values[column.name] = _cell(file, f"{where}: {column.name}", str(column.type), text)
            rows.append(Row(**values))
    except csv.Error as error:
        file.fail(f"line {reader.line_num}", "be one of a CSV", str(error))
    return rows


def _cell(file: Source, field: str, kind: str, text: str) -> Any:
    """A cell as the value of its column."""
    name = field.split()[-1]
    if kind == "str":
        if name in _CHOICES and text not in _CHOICES[name]:
            file.fail(field, f"be one of {', '.join(_CHOICES[name])}", shown(text))
        return text
    if not text and kind == "float" and name != "distance":
        return math.nan
    if not _NUMBER[kind].fullmatch(text):
        file.fail(field, "be a whole number" if kind == "int" else "be a number, or empty", shown(text))
    value = int(text) if kind == "int" else float(text)
    least = 1 if name in ("n", "h", "v") else 0
    if name != "peak_bytes" and value < least:  # a difference of two readings, which may be below 0
        file.fail(field, f"be at least {least}", text)
    return value


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a CSV; the file is never there in part."""

    def text(value: Any) -> Any:
        if isinstance(value, float):
            return "" if math.isnan(value) else f"{value:.6g}"
        return value

    write_csv(path, [{name: text(value) for name, value in asdict(row).items()} for row in rows], HEADER)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], header: Sequence[str] | None = None) -> None:
    """Write lines that are no `Row`s; header: by default the first line's names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if header is None else header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
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
    """Rows of each case on each machine, in the order of their first rows."""
    groups: dict[tuple[str, Case], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.machine, row.case), []).append(row)
    return [(case, group) for (_, case), group in groups.items()]


def number(value: float, form: str = ".2f", unit: str = "") -> str:
    """For a reader; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:{form}}{unit}"


def megabytes(count: float) -> str:
    """Bytes in MB, two digits where they are few; a dash where there are none."""
    return number(count / 1e6, ".0f" if not abs(count) < 1e7 else ".2g")


def render(rows: list[Row]) -> list[Any]:
    """A rich table a case, and the reasons of what was not measured."""
    from rich.markup import escape
    from rich.table import Table

    tables = []
    for case, group in by_case(rows):
        done = [row for row in group if row.status == "ok"]
        lost = [row for row in group if row.status not in (OK, SKIPPED)]
        best = min((row.over_floor for row in done), default=math.nan)
        table = Table(title=str(case), title_justify="left", caption_justify="left")
        headings = ["", "ms (low..high)", "rounds", "x floor (low..high)", "x eager", "x best peer", "peak MB"]
        headings += ["error of loss", "dhidden", "dweight"]
        for heading in headings:
            table.add_column(heading, justify="right" if heading else "left")
        for row in sorted(done, key=lambda row: row.over_floor):
            marks = ("[bold]" if row.ours else "") + ("[green]" if row.over_floor == best else "")
            table.add_row(
                marks + escape(row.implementation),
                f"{number(row.ms, '.4g')} ({number(row.ms_low, '.4g')}..{number(row.ms_high, '.4g')})",
                str(row.rounds),
                f"{number(row.over_floor)} ({number(row.over_floor_low)}..{number(row.over_floor_high)})",
                number(row.over_eager),
                number(row.over_best_peer),
                megabytes(row.peak_bytes),
                number(row.error_loss, ".0e"),
                number(row.error_dhidden, ".1e"),
                number(row.error_dweight, ".1e"),
            )
        for row in lost:
            table.add_row(escape(row.implementation), left_out(row))
        lines = reasons(group)
        if done:
            floors, counts = [row.floor_ms for row in done], {row.error_rows for row in done} - {0, case.shape.n}
            fewer = f"; errors are of the first {max(counts)} rows" if counts else ""
            products = f"{case.products()} products in {done[0].floor_dtype or case.dtype}"
            lines.insert(0, f"floor: {products}, {min(floors):.4g}..{max(floors):.4g} ms{fewer}")
        if case.distance:
            lines.insert(0, f"KL(teacher || model) is {group[0].teacher_kl:.3g} nats, measured in float64")
        if case.inputs != RANDOM and case.shape.n > problems.TEXT_ROWS:
            lines.insert(0, f"rows repeat after {problems.TEXT_ROWS}, which are all that the model was run over")
        table.caption = escape("\n".join(lines))
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
            ours, least = mine[0], min((row.peak_bytes for row in others if row.peak_bytes > 0), default=math.nan)
            table.add_row(
                str(case), ours.implementation.removeprefix(OURS), number(ours.ms, ".4g"), number(ours.over_floor),
                number(ours.over_eager), number(ours.over_best_peer), others[0].implementation if others else "–",
                megabytes(ours.peak_bytes), megabytes(least),
            )  # fmt: skip
        else:
            states = "; ".join(f"{row.implementation}: {row.status}" for row in group if row.ours)
            table.add_row(str(case), states or "–")
    return table


def reasons(rows: Iterable[Row]) -> list[str]:
    """Who was not measured, and why: a line a reason."""
    said: dict[str, list[str]] = {}
    for row in rows:
        if row.status != OK:
            why = " ".join(row.reason.split())
            said.setdefault(f"{row.status}, {textwrap.shorten(why, REASON, placeholder='...')}", []).append(
                row.implementation
            )
    return [f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in said.items()]


def left_out(row: Row) -> str:
    """The status of what was not measured, with the limit that it went beyond."""
    slower = re.match(rf"{SLOWER} (\S+ s)", row.reason)
    return f"over {slower[1]}" if row.status == TIMED_OUT and slower else row.status


def markdown(rows: list[Row], shape: Shape, dtypes: Sequence[str], note: str = "") -> str:
    """The README's table: time over the floor and peak memory of every implementation, a column a dtype and loss.

    note: why ours is not the lowest peak in the cells where it is not, which are marked; ValueError where such a cell
    has no note, or a note no cell."""
    whole = ("both", RANDOM)
    rows = [r for r in rows if r.case.shape == shape and r.dtype in dtypes and (r.part, r.inputs) == whole]
    machines = list(dict.fromkeys(row.machine for row in rows))
    if len(machines) != 1:
        raise ValueError(
            f"bench: the CSV must have rows of {shape} in {' and '.join(dtypes)} of one machine, got {len(machines)} "
            "machines. Measure them first, or name a CSV for each machine."
        )
    cells = {(row.implementation, row.dtype, row.loss): row for row in rows}
    columns = [(dtype, loss) for dtype in dtypes for loss in LOSSES if any(of[1:] == (dtype, loss) for of in cells)]
    names = list(dict.fromkeys(row.implementation for row in rows if row.status != SKIPPED))
    absent = dict.fromkeys(row.implementation for row in rows if row.implementation not in names)
    marked = set()
    for dtype, loss in columns:
        peaks = {row.implementation: row for row in rows if (row.dtype, row.loss, row.status) == (dtype, loss, OK)}
        least = min((row.peak_bytes for row in peaks.values() if not row.ours), default=math.inf)
        if MAIN in peaks and peaks[MAIN].peak_bytes > least:
            marked.add((MAIN, dtype, loss))
    if bool(marked) != bool(note):
        where = ", ".join(f"{LOSSES[loss].title} in {dtype}" for _, dtype, loss in sorted(marked))
        raise ValueError(
            f"bench: the note of {shape} must {'say why a peer has a lower peak' if marked else 'be left out'}, got "
            f"{where or repr(note)}. Change NOTES of bench/readme.py."
        )

    def cell(*of: str) -> str:
        row = cells.get((of[0], of[1], of[2]))
        if row is None or row.status == SKIPPED:
            return ""
        if row.status != OK:
            return left_out(row)
        return f"{row.over_floor:.2f}, {megabytes(row.peak_bytes)} MB" + (" ¹" if of in marked else "")

    one = len(dtypes) == 1
    titles = [LOSSES[loss].title + ("" if one else f", {dtype}") for dtype, loss in columns]
    lines = [
        "| " + " | ".join([f"{shape}, {dtypes[0]}" if one else str(shape), *titles]) + " |",
        "|---" * (len(columns) + 1) + "|",
        *("| " + " | ".join([name, *(cell(name, *of) for of in columns)]) + " |" for name in names),
    ]
    commits, dates, torches = (
        ", ".join(dict.fromkeys(getattr(row, what) for row in rows)) for what in ("commit", "date", "torch")
    )
    others = dict.fromkeys(row.package for row in rows if row.status == OK and not row.ours)
    packages = ", ".join([f"torch {torches}", *(name for name in others if name.split()[0] != "torch")])
    below = [f"{machines[0]}; {packages}; commit {commits}; {dates}."]
    wide = [
        dtype for dtype in dtypes if {row.floor_dtype for row in rows if row.dtype == dtype} & {"float32"} - {dtype}
    ]
    if wide:
        below.append(f"In {' and '.join(wide)} the floor is the products of fp32 copies, which are the faster here.")
    if absent:
        below.append(f"Not measured, since they do not run here: {', '.join(absent)}.")
    if note:
        below.append(f"¹ {note}")
    return "\n".join([*lines, "", " ".join(below)])
