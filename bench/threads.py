"""A loss beside other busy processes: python bench/threads.py [--csv FILE] [--rounds 5] ...

Ours and eager, forward and backward, on 1 and 2 threads and on twice as many as there are processors; alone, and beside
one process per processor that computes all the time, at the same priority. Each number of threads, and each setting of
OpenMP, has a process of its own; within it ours and eager alternate, so that both meet the same load.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dft_kernels.benchmarks.floor import Clock
from dft_kernels.benchmarks.implementations import EAGER
from dft_kernels.benchmarks.inputs import Inputs
from dft_kernels.benchmarks.measure import timed
from dft_kernels.benchmarks.peers import everyone
from dft_kernels.benchmarks.problems import LOSSES, Case, Shape
from dft_kernels.benchmarks.runs import about, instructions, processor
from dft_kernels.benchmarks.tables import MAIN, write_csv

SETTINGS: dict[str, dict[str, str]] = {
    "": {},
    **{f"{name}={value}": {name: value} for name, value in (("OMP_WAIT_POLICY", "passive"), ("OMP_PROC_BIND", "true"))},
}


@dataclass
class Row:
    """Ours and eager on some threads, beside so many busy processes."""

    loss: str
    shape: str
    threads: int
    setting: str  # of `SETTINGS`
    busy: int
    rounds: int
    ours_ms: float  # medians
    ours_low: float
    ours_high: float
    eager_ms: float
    over_eager: float  # of ratios within a round
    over_low: float
    over_high: float


def times(case: Case, threads: int, rounds: int, connection: Any) -> None:
    """In a process of its own: pairs of milliseconds, ours and eager's, a round."""
    torch.set_num_threads(threads)
    table, clock, x = everyone(), Clock(case.device), Inputs.make(case, 0)
    calls = [table[name].prepare(case) for name in (MAIN, EAGER.name)]
    for call in calls:
        timed(case, call, x, clock)
    connection.send("warm")
    connection.recv()  # the others are busy now
    pairs = []
    for number in range(rounds):
        took = {}
        for place in (0, 1) if number % 2 else (1, 0):
            took[place] = timed(case, calls[place], x, clock)
        pairs.append((took[0], took[1]))
    connection.send(pairs)


def spin() -> None:
    """Until the end of the process."""
    while True:
        pass


@contextlib.contextmanager
def beside(busy: int) -> Iterator[None]:
    """So many busy processes."""
    crowd = [multiprocessing.get_context("fork").Process(target=spin, daemon=True) for _ in range(busy)]
    for process in crowd:
        process.start()
    try:
        yield
    finally:
        for process in crowd:
            process.kill()
            process.join()


@contextlib.contextmanager
def environment(**settings: str) -> Iterator[None]:
    """Of processes that start within; OpenMP reads it when it is loaded."""
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def measured(case: Case, threads: int, setting: str, busy: int, rounds: int) -> Row:
    """One line of the CSV."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=times, args=(case, threads, rounds, there), daemon=True)
    with environment(OMP_NUM_THREADS=str(threads), **SETTINGS[setting]):
        process.start()
    there.close()
    here.recv()
    with beside(busy):
        here.send("go")
        pairs = here.recv()
    process.join()
    ours, eager = zip(*pairs, strict=True)
    over = [mine / its for mine, its in pairs]
    return Row(
        case.loss, str(case.shape), threads, setting, busy, rounds, statistics.median(ours), min(ours), max(ours),
        statistics.median(eager), statistics.median(over), min(over), max(over),
    )  # fmt: skip


def plan(cores: int) -> Iterator[tuple[int, str, int]]:
    """Threads, setting, busy processes."""
    for busy in (0, cores):
        for threads in dict.fromkeys((1, 2, cores, 2 * cores)):
            yield threads, "", busy
        for setting in filter(None, SETTINGS):
            yield cores, setting, busy


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Shape.parse, default=Shape(1024, 576, 49152), metavar="N,H,V")
    parser.add_argument("--loss", choices=tuple(LOSSES), default="forward_kl")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commit", help="what the rows say was measured (default: what git says)")
    parser.add_argument("--csv", type=Path, help="write the rows")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}. Give a whole number.")
    case = Case(options.shape, options.dtype, options.loss, "both", "cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    known = about("cpu", options.commit) | {"machine": f"{processor()}, {cores} cores, {instructions()}"}
    known["load"] = f"{os.getloadavg()[0]:.1f}"  # of others, while nothing of this has begun
    lines = []
    print(f"load {known['load']}; {case}: ours, and over eager in the same round (least to most)")
    for threads, setting, busy in plan(cores):
        row = measured(case, threads, setting, busy, options.rounds)
        lines.append(known | {"dtype": case.dtype} | asdict(row))
        said = f"{row.ours_ms:8.0f} ms, {row.over_eager:.2f} ({row.over_low:.2f} to {row.over_high:.2f})"
        print(f"  {threads} threads {setting:24} beside {busy}: {said}", flush=True)
    if options.csv:
        write_csv(options.csv, [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in x.items()} for x in lines])
    return 0


if __name__ == "__main__":
    sys.exit(main())
