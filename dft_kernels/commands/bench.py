"""`dft-kernels bench`: the losses of this library, of PyTorch and of other libraries, against the floor.

A preset, or your own --shape, is measured by every implementation that runs here: time over that of the bare matrix
products (the floor), peak extra memory, and the distance of loss and gradients to float64. What does not run is named
with the reason. Each is measured in processes of their own under a memory limit.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch

from ..backends import BACKENDS
from ..benchmarks import plots, real, runs, selection, tables
from ..benchmarks.peers import everyone
from ..benchmarks.problems import DISTANCES, LOSSES, PARTS, PRESETS, RANDOM, REAL, SWEEPS, Case, Shape
from ..benchmarks.tables import Row
from ..benchmarks.worker import OK
from .arguments import Checked, Number, OutputFile, Parser, UsageError, Whole, device, input_file
from .flags import add_cache
from .printing import console

SECONDS = 30.0  # of rounds an implementation; a slower one is measured less often, at least once
TIMEOUT = 300.0


def parser() -> Parser:
    """The options of `dft-kernels bench`."""
    made = Parser(prog="dft-kernels bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    presets = "\n".join(f"  {name}: {preset.about}" for name, preset in PRESETS.items())
    kept, shape = Checked(_check_kept), Checked(Shape.parse)
    add = made.add_argument
    add("--preset", choices=tuple(PRESETS), help=f"what to measure (default: quick)\n{presets}")
    add(
        "--inputs", choices=(RANDOM, *REAL), default=RANDOM,
        help="random, or a model's hidden states over text and its head, with teachers at KL "
        f"{', '.join(f'{distance:g}' for distance in DISTANCES)}\nfrom it: how exact each implementation is "
        f"near agreement (default: random; else N {selection.REAL_ROWS})",
    )  # fmt: skip
    add_cache(made)
    add(
        "--shape", nargs="+", type=shape, metavar="N,H,V", help="rows, hidden size, vocabulary; instead of the preset's"
    )
    add(
        "--sweep",
        nargs="+",
        choices=tuple(SWEEPS),
        default=[],
        help="also vary N, V or H of the first shape, dtype, part",
    )
    add("--dtype", nargs="+", choices=("bfloat16", "float16", "float32"), help="default: the preset's, bfloat16")
    add("--loss", nargs="+", choices=tuple(LOSSES), help="default: the preset's")
    add("--part", nargs="+", choices=PARTS, default=["both"], help="default: forward and backward together")
    add("--backend", nargs="*", choices=tuple(BACKENDS), help="ours to measure (default: all that run; none: no name)")
    add(
        "--peer", nargs="*", type=Checked(selection.check_peer), metavar="NAME",
        help="others, by the beginning of their names; see --list (default: all)",
    )  # fmt: skip
    add("--list", action="store_true", help="name the implementations, and what runs here")
    add("--device", choices=("cpu", "cuda"), type=device, help="default: cuda where there is one")
    add("--rounds", type=Whole(1), help="of floor and implementations, interleaved (default: the preset's)")
    add(
        "--memory-limit",
        type=Number(above=0),
        metavar="GB",
        help="of each process (default: 80 %% of what is available)",
    )
    add("--timeout", type=Number(above=0), default=TIMEOUT, metavar="S", help="for one call (default: %(default).0f)")
    add("--csv", type=kept, metavar="FILE", help="keep the rows; other runs' rows in it stay, the same are replaced")
    add("--json", type=OutputFile(), metavar="FILE", help="the rows of this run as JSON")
    add(
        "--plot", type=OutputFile(".png"), metavar="FILE.png",
        help="scaling and roofline, of all rows in --csv and of this run",
    )  # fmt: skip
    add(
        "--trace", type=OutputFile(), metavar="FILE.json.gz",
        help="a profile of one step: the first implementation and case",
    )  # fmt: skip
    add("--commit", help="what the rows say was measured (default: what git says)")
    add("--brief", action="store_true", help="one line a case instead of tables")
    add(
        "--show",
        type=Checked(_check_rows),
        metavar="FILE.csv",
        help="measure nothing: the tables (and --plot) of a CSV",
    )
    return made


def _check_rows(text: str) -> None:
    tables.read(input_file(text))


def _check_kept(text: str) -> None:
    if OutputFile()(text).exists():
        _check_rows(text)


def run(options: argparse.Namespace) -> int:
    """Measure, print, and write."""
    out = console(160)
    if options.list:
        _list(_device(options), out)
        return 0
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own start and stop lines
    rows = _shown(options, out) if options.show else _measured(options, out)
    if options.plot:
        plots.draw(tables.merged(_kept(options.csv), rows), options.plot)
        out.print(f"pictures are in {options.plot}", markup=False)
    return 0


def stopped(options: argparse.Namespace) -> str:
    """What an interrupted command leaves."""
    return f"finished cases are in {options.csv}" if options.csv else ""


def _device(options: argparse.Namespace) -> str:
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def todo(options: argparse.Namespace, device: str) -> dict[Case, bool]:
    """The cases that the options ask for, by `selection.cases`."""
    shapes = [Shape.parse(text) for text in options.shape or ()]
    if options.inputs != RANDOM:
        _check_real(options.inputs, shapes, options)
    return selection.cases(
        device, options.preset, shapes, options.sweep, options.dtype, options.loss, options.part, options.inputs
    )  # fmt: skip


def _check_real(name: str, shapes: list[Shape], options: argparse.Namespace) -> None:
    """UsageError for what a model's inputs cannot be."""
    h, v = REAL[name]
    for flag, wanted in (("--shape", shapes), ("--preset", PRESETS[options.preset].shapes if options.preset else ())):
        for shape in wanted if flag == "--shape" or not shapes else ():
            if (shape.h, shape.v) != (h, v):
                raise UsageError(
                    f"{flag} must have the head of {name}, H {h}, V {v}, with --inputs {name}, got {shape}. Give "
                    f"--shape N,{h},{v}, or leave --inputs out."
                )
    if options.sweep:
        raise UsageError(
            f"--sweep must be left out with --inputs {name}, got {' '.join(options.sweep)}. Its errors are not "
            f"measured: name sizes of N as --shape 1024,{h},{v} 4096,{h},{v}."
        )


def _shown(options: argparse.Namespace, out: Any) -> list[Row]:
    rows = tables.read(Path(options.show))
    _print(rows, options.brief, out)
    return rows


def _measured(options: argparse.Namespace, out: Any) -> list[Row]:
    plan = {case: errors for case, errors in todo(options, _device(options)).items() if _names(options, case)}
    if not plan:
        raise UsageError("bench: --backend, --peer and --loss must leave something, got nothing. See --list.")
    rows = _measure(options, plan, out)
    for line in tables.reasons(rows) if options.brief else ():
        out.print(line, markup=False)
    if options.json:
        tables.write_json(options.json, rows)
    if options.trace:
        case = next(iter(plan))
        ran = [row.implementation for row in rows if row.case == case and row.status == "ok"]
        file = None if case.inputs == RANDOM else real.prepared(case, options.cache, lambda _: None).file
        out.print(f"a trace of {selection.trace(case, ran, options.trace, file)} is in {options.trace}", markup=False)
    return rows


def _names(options: argparse.Namespace, case: Case) -> list[str]:
    return selection.names(case.loss, options.backend, options.peer)


def _measure(options: argparse.Namespace, plan: dict[Case, bool], out: Any) -> list[Row]:
    """The rows of all cases; printed and kept case by case."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    device = _device(options)
    limit = int(options.memory_limit * 1e9) if options.memory_limit else runs.default_limit(device)
    rounds = options.rounds or PRESETS[options.preset or "quick"].rounds
    about = runs.about(device, options.commit)
    rows: list[Row] = []
    peaks: dict[Case, dict[str, int | None]] = {}  # by the case without its distance, which changes no size
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, refresh_per_second=1, transient=True) as progress:
        task = progress.add_task("", total=len(plan))
        for case, errors in plan.items():

            def tell(text: str, case: Case = case) -> None:
                progress.update(task, description=f"{LOSSES[case.loss].title}, {case.shape}: {text}")

            inputs = None if case.inputs == RANDOM else real.prepared(case, options.cache, tell)
            known = peaks.setdefault(case._replace(distance=0.0), {})
            seen, ceilings = runs.measure_case(
                case, _names(options, case), rounds=rounds, seconds=SECONDS, limit=limit, timeout=options.timeout,
                errors=errors, progress=tell, file=inputs.file if inputs else None, peaks=known,
            )  # fmt: skip
            known.update({name: one.peak for name, one in seen.items() if one.status == OK})
            new = runs.rows_of(
                case, seen, ceilings, about, inputs.kl.get(case.distance, math.nan) if inputs else math.nan
            )
            rows += new
            if options.csv:
                tables.write(Path(options.csv), tables.merged(_kept(options.csv), new))
            _print(new, options.brief, progress.console)
            progress.update(task, advance=1)
    return rows


def _print(rows: list[Row], brief: bool, out: Any) -> None:
    for table in [tables.brief(rows)] if brief else tables.render(rows):
        out.print(table)


def _kept(name: str | None) -> list[Row]:
    return tables.read(Path(name)) if name is not None and Path(name).exists() else []


def _list(device: str, out: Any) -> None:
    from rich.table import Table

    table = Table("implementation", "package", "losses", "here")
    for name, each in everyone().items():
        case = Case(Shape(8, 16, 32), "bfloat16", each.losses[0], "both", device)
        here = selection.prepared(name, case)
        table.add_row(name, each.version(), ", ".join(each.losses), here if isinstance(here, str) else "runs")
    out.print(table)
