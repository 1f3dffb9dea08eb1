"""`dft-kernels bench`: the losses of this library, of PyTorch and of other libraries, against the floor.

A preset, or your own --shape, is measured by every implementation that runs here: time over that of the bare matrix
products (the floor: in the inputs' dtype or in fp32, whichever is the faster here), peak extra memory, and the distance
of loss and gradients to float64. What does not run, or takes too long, is named with the reason. Each is measured in
processes of their own under a memory limit.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from pathlib import Path
from typing import Any

import torch

from ..backends import BACKENDS
from ..benchmarks import plots, real, runs, selection, tables
from ..benchmarks.peers import everyone
from ..benchmarks.problems import DISTANCES, LIMIT, LOSSES, PARTS, PRESETS, RANDOM, REAL, SWEEPS, Case, Shape
from ..benchmarks.tables import Row
from ..benchmarks.worker import OK, SKIPPED, TIMED_OUT
from .arguments import Checked, Number, OutputFile, Parser, UsageError, Whole, device, input_file
from .flags import add_cache, add_quiet
from .printing import console, progress


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
    add(
        "--limit", type=Number(above=0), metavar="S",
        help="seconds: who takes longer for one call is left out of this case, and of those that need no less; what\n"
        "torch.compile compiles in a call does not count, nor on a GPU a first call, in which kernels are tuned. All\n"
        f"rounds of one take as long at most (default: {LIMIT:g}; of the preset quick {PRESETS['quick'].limit:g})",
    )  # fmt: skip
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
    add_quiet(made)
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
    out = console(160, options.quiet)
    if options.list:
        _list(_device(options), out)
        return 0
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own start and stop lines
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # of semaphores of workers that were ended
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


def _limit(options: argparse.Namespace) -> float:
    """Seconds of a call: of the preset, unless something else is measured in its place."""
    own = options.preset is None and (options.shape or options.sweep or options.inputs != RANDOM)
    return float(options.limit or (LIMIT if own else PRESETS[options.preset or "quick"].limit))


def _measure(options: argparse.Namespace, plan: dict[Case, bool], out: Any) -> list[Row]:
    """The rows of all cases: a line as each is measured; a table, and the CSV, case by case."""
    device, limit = _device(options), _limit(options)
    memory_limit = int(options.memory_limit * 1e9) if options.memory_limit else runs.default_limit(device)
    rounds = options.rounds or PRESETS[options.preset or "quick"].rounds
    about = runs.about(device, options.commit)
    rows: list[Row] = []
    with progress("measuring", sum(len(_names(options, case)) for case in plan), "rows", options.quiet) as bar:
        for case, errors in plan.items():
            title, over = f"{LOSSES[case.loss].title}, {case.shape}", set[str]()

            def tell(text: str, title: str = title) -> None:
                bar.say(f"{title}: {text}")

            def found(name: str, one: runs.Seen, over: set[str] = over) -> None:
                if name not in over and (one.status != OK or one.rounds):
                    over.add(name)
                    bar(1)
                if one.status != SKIPPED and not options.brief:
                    out.print(f"  {name:32} {_said(one)}", markup=False)

            if not options.brief:
                out.print(str(case), markup=False)
            inputs = None if case.inputs == RANDOM else real.prepared(case, options.cache, tell)
            seen, machine = runs.measure_case(
                case, _names(options, case), rounds=rounds, limit=limit, memory_limit=memory_limit, errors=errors,
                progress=tell, found=found, file=inputs.file if inputs else None, known=_known(case, rows),
            )  # fmt: skip
            new = runs.rows_of(
                case, seen, machine, about, inputs.kl.get(case.distance, math.nan) if inputs else math.nan
            )
            rows += new
            if options.csv:
                tables.write(Path(options.csv), tables.merged(_kept(options.csv), new))
            _print(new, options.brief, out)
    return rows


def _said(one: runs.Seen) -> str:
    """What is known of an implementation, in a line."""
    if one.status != OK:
        return f"{one.status}, {' '.join(one.reason.split())[: tables.REASON]}"
    if not one.rounds:
        return f"{tables.megabytes(math.nan if one.peak is None else one.peak)} MB"
    ms, ratios = [mine for _, mine in one.rounds.values()], [mine / floor for floor, mine in one.rounds.values()]
    return f"{statistics.median(ms):.4g} ms, {statistics.median(ratios):.2f} x floor"


def _known(case: Case, rows: list[Row]) -> dict[str, runs.Seen]:
    """What rows of this run say of a case before it is measured: the peak, where a teacher's distance alone is another;
    who takes too long, since it did with less to do."""
    known = {}
    for row in rows:
        if row.status == OK and row.case._replace(distance=case.distance) == case and not math.isnan(row.peak_bytes):
            known[row.implementation] = runs.Seen(peak=int(row.peak_bytes))
        elif row.status == TIMED_OUT and case.needs_no_less_than(row.case):
            reason = row.reason if "with less" in row.reason else f"{row.reason} with less to do: {row.case}"
            known[row.implementation] = runs.Seen(TIMED_OUT, reason)
    return known


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
