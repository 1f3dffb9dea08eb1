"""`dft-kernels bench`: the losses of this library, of PyTorch and of other libraries, against the floor.

A preset, or your own --shape, is measured by every implementation that runs here: time over that of the bare matrix
products (the floor), peak extra memory, and the distance of loss and gradients to float64. What does not run is named
with the reason. Each is measured in processes of their own under a memory limit.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..backends import BACKENDS
from ..benchmarks import plots, runs, tables
from ..benchmarks.implementations import OURS, Call
from ..benchmarks.peers import everyone
from ..benchmarks.problems import LOSSES, PARTS, PRESETS, SWEEPS, Case, Inputs, Shape, sweep
from ..benchmarks.tables import Row

SECONDS = 30.0  # of rounds an implementation; a slower one is measured less often, at least once
TIMEOUT = 300.0
SWEPT = ("cross_entropy", "forward_kl")  # the losses of a sweep where none is named


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="dft-kernels bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    presets = "\n".join(f"  {name}: {preset.about}" for name, preset in PRESETS.items())
    add = made.add_argument
    add("--preset", choices=tuple(PRESETS), help=f"what to measure (default: quick)\n{presets}")
    add("--shape", nargs="+", metavar="N,H,V", help="rows, hidden size, vocabulary; instead of the preset's")
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
    add("--peer", nargs="*", metavar="NAME", help="others, by the beginning of their names; see --list (default: all)")
    add("--list", action="store_true", help="name the implementations, and what runs here")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--rounds", type=positive, help="of floor and implementations, interleaved (default: the preset's)")
    add("--memory-limit", type=float, metavar="GB", help="of each process (default: 80 %% of what is available)")
    add("--timeout", type=float, default=TIMEOUT, metavar="S", help="for one call (default: %(default).0f)")
    add("--csv", type=Path, metavar="FILE", help="keep the rows; other runs' rows in it stay, the same are replaced")
    add("--json", type=Path, metavar="FILE", help="the rows of this run as JSON")
    add("--plot", type=Path, metavar="FILE.png", help="scaling and roofline, of all rows in --csv and of this run")
    add("--trace", type=Path, metavar="FILE.json.gz", help="a profile of one step: the first implementation and case")
    add("--commit", help="what the rows say was measured (default: what git says)")
    add("--brief", action="store_true", help="one line a case instead of tables")
    add("--show", type=Path, metavar="FILE.csv", help="measure nothing: the tables (and --plot) of a CSV")
    return made


def plan(options: argparse.Namespace, device: str) -> dict[Case, bool]:
    """The cases that the options ask for, in order, and whether their errors are measured: a sweep is about time and
    memory, and float64 at its far end is neither cheap nor news."""
    preset = PRESETS[options.preset or "quick"]
    shapes = [Shape.parse(text) for text in options.shape] if options.shape else list(preset.shapes)
    dtypes, losses = options.dtype or preset.dtypes, options.loss or preset.losses
    found = {
        Case(shape, dtype, loss, part, device): True
        for shape in shapes
        for dtype in dtypes
        for loss in losses
        for part in options.part
    }
    for dimension in options.sweep or (() if options.shape else preset.sweeps):
        for shape in sweep(dimension, shapes[0]):
            for loss in options.loss or SWEPT:
                found.setdefault(Case(shape, dtypes[0], loss, options.part[0], device), False)
    return found


def chosen(options: argparse.Namespace, loss: str | None = None) -> list[str]:
    """Names of the implementations that --backend and --peer leave, and that have a loss."""
    table = everyone()
    others = [name for name, each in table.items() if not each.ours]
    for begin in options.peer or ():
        if not any(name.startswith(begin) for name in others):
            raise ValueError(
                f"bench: --peer must begin names of implementations, got {begin!r}. They are: {', '.join(others)}."
            )
    left = [OURS + name for name in (BACKENDS if options.backend is None else options.backend)]
    left += [name for name in others if options.peer is None or name.startswith(tuple(options.peer))]
    return [name for name in left if loss is None or loss in table[name].losses]


def measure(options: argparse.Namespace, todo: dict[Case, bool], console: Any) -> list[Row]:
    """The rows of all cases; printed and kept case by case."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    device = next(iter(todo)).device
    limit = int(options.memory_limit * 1e9) if options.memory_limit else runs.default_limit(device)
    rounds = options.rounds or PRESETS[options.preset or "quick"].rounds
    about = runs.about(device, options.commit)
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=1, transient=True) as progress:
        task = progress.add_task("", total=len(todo))
        for case, errors in todo.items():

            def tell(text: str, case: Case = case) -> None:
                progress.update(task, description=f"{LOSSES[case.loss].title}, {case.shape}: {text}")

            seen, ceilings = runs.measure_case(
                case, chosen(options, case.loss), rounds=rounds, seconds=SECONDS, limit=limit,
                timeout=options.timeout, errors=errors, progress=tell,
            )  # fmt: skip
            new = runs.rows_of(case, seen, ceilings, about)
            rows += new
            if options.csv:
                tables.write(options.csv, tables.merged(_kept(options.csv), new))
            _print(new, options.brief, progress.console)
            progress.update(task, advance=1)
    return rows


def _print(rows: list[Row], brief: bool, console: Any) -> None:
    for table in [tables.brief(rows)] if brief else tables.render(rows):
        console.print(table)


def _kept(path: Path | None) -> list[Row]:
    return tables.read(path) if path is not None and path.exists() else []


def trace(case: Case, names: Sequence[str], path: Path) -> str:
    """A profile of one forward and backward, written for chrome://tracing, of the first of `names` that runs here."""
    ready = ((name, _prepared(name, case)) for name in names)
    name, call = next(((name, call) for name, call in ready if callable(call)), ("", None))
    if call is None:
        raise ValueError(f"bench: --trace needs an implementation of {case} that runs here, got none. See --list.")
    x = Inputs.make(case, 0)
    call(x).backward()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if case.device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=kinds, record_shapes=True) as profile:
        call(x).backward()
        if case.device == "cuda":
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(path))
    return name


def _prepared(name: str, case: Case) -> Call | str:
    """An implementation ready to call, or why it does not run here."""
    try:
        return everyone()[name].prepare(case)
    except Exception as reason:  # an import may raise anything
        return str(reason)


def _list(device: str, console: Any) -> None:
    from rich.table import Table

    table = Table("implementation", "package", "losses", "here")
    for name, each in everyone().items():
        case = Case(Shape(8, 16, 32), "bfloat16", each.losses[0], "both", device)
        here = _prepared(name, case)
        table.add_row(name, each.version(), ", ".join(each.losses), here if isinstance(here, str) else "runs")
    console.print(table)


def _check(options: argparse.Namespace, device: str) -> None:
    """What would fail after the work, before it."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: --device cuda needs a GPU that torch sees, got none. Leave it out, or see nvidia-smi.")
    for path in (options.csv, options.json, options.plot, options.trace):
        if path is not None and path.is_dir():
            raise ValueError(f"bench: {path} must be a file's name, got a folder. Name a file in it.")
    if options.plot is not None and options.plot.suffix != ".png":
        raise ValueError(f"bench: --plot must end in .png, got {options.plot}. Rename it.")
    if options.memory_limit is not None and options.memory_limit <= 0:
        raise ValueError(f"bench: --memory-limit must be positive gigabytes, got {options.memory_limit:g}.")
    _kept(options.csv)
    chosen(options)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write."""
    options = parser().parse_args(arguments)
    try:
        import matplotlib  # noqa: F401
        from rich.console import Console
    except ImportError as error:
        print(f"bench: the extra 'bench' must be installed, got: {error}. Run pip install 'dft-kernels[bench]'.")
        return 2
    wide = None if sys.stdout.isatty() else 160
    console = Console(width=wide)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own start and stop lines
    try:
        _check(options, device)
        if options.list:
            _list(device, console)
            return 0
        if options.show:
            rows = tables.read(options.show)
            _print(rows, options.brief, console)
        else:
            todo = {case: errors for case, errors in plan(options, device).items() if chosen(options, case.loss)}
            if not todo:
                raise ValueError("bench: --backend, --peer and --loss must leave something, got nothing. See --list.")
            rows = measure(options, todo, console)
            for line in tables.skipped(rows):
                console.print(line, markup=False)
            if options.json:
                tables.write_json(options.json, rows)
            if options.trace:
                case = next(iter(todo))
                name = trace(
                    case, [row.implementation for row in rows if row.case == case and row.status == "ok"], options.trace
                )
                console.print(f"a trace of {name} is in {options.trace}", markup=False)
        if options.plot:
            plots.draw(tables.merged(_kept(options.csv), rows), options.plot)
            console.print(f"pictures are in {options.plot}", markup=False)
    except (ValueError, OSError, RuntimeError) as error:  # the last: a GPU, or memory, that is gone
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = f"; finished cases are in {options.csv}" if options.csv else ""
        print(f"bench: stopped{kept}", file=sys.stderr)
        return 130
    return 0


def positive(text: str) -> int:
    """An option's whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
