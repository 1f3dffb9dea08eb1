"""Times on one GPU against the floor, beside torch.compile of the eager loss: python bench/timings.py [--limit 70] ...

One process, events of the GPU, every implementation in turn with the floor, round by round. What matters most comes
first, so that a limit of time leaves out what matters least; each case is written to the CSV as soon as it is measured,
and printed beside its bar. The cells, in order: cross-entropy, KL to stored logits, forward KL and JSD to a teacher's
head at N 8192, H 4096, V 128256; the Python time of a call; smaller and larger heads; N from 256 to 131072; other
libraries.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dft_kernels.backends import BACKENDS
from dft_kernels.backends.cuda import CudaBackend
from dft_kernels.benchmarks import measure, runs, selection, tables
from dft_kernels.benchmarks.implementations import EAGER, NARROW, OURS, Implementation, Unavailable
from dft_kernels.benchmarks.inputs import Inputs
from dft_kernels.benchmarks.peers import everyone
from dft_kernels.benchmarks.problems import Case, Shape
from dft_kernels.benchmarks.worker import FAILED, OK, OUT_OF_MEMORY, SKIPPED, TIMED_OUT

COMPILED = "torch.compile(eager)"
EXPONENTIAL = "dft_kernels cuda_exponential"  # beside the others in cross-entropy, until it is chosen by itself
EVERYBODY = (*(OURS + name for name in BACKENDS if name != "reference"), NARROW, COMPILED)
LLAMA, QWEN, SMOLLM2 = Shape(8192, 4096, 128256), Shape(8192, 4096, 151936), Shape(4096, 576, 49152)
SWEPT = (256, 131072, 1024, 32768, 4096, 65536, 16384)  # rows
HOST = Shape(64, 64, 1024)
HOST_BAR = 0.5  # ms of a call, forward and backward
TINY = Shape(16, 8, 64)  # of a dry run
LEAST = 4.0  # seconds left under which nothing is begun


class Cell(NamedTuple):
    """A loss at a shape, and what our time over the floor is to be, with logits in fp32 and in bf16; None: no bar. gib:
    what our memory is to be with logits in fp32."""

    loss: str
    shape: Shape
    bar: float | None = None
    narrow_bar: float | None = None
    gib: float | None = None
    names: tuple[str, ...] = EVERYBODY
    rounds: int = 10


CELLS = (
    Cell("cross_entropy", LLAMA, 1.10, 1.06),
    Cell("stored_kl", LLAMA, 1.14, 1.10),
    Cell("forward_kl", LLAMA, 1.17, 1.12),
    Cell("jensen_shannon", LLAMA, 1.22, 1.17),
)
LATER = (
    Cell("cross_entropy", SMOLLM2, 1.5),
    Cell("cross_entropy", QWEN, 1.15, gib=4.2),
    Cell("forward_kl", SMOLLM2, 1.6),
    *(Cell("cross_entropy", LLAMA._replace(n=n), rounds=3) for n in SWEPT),
    Cell("stored_kl", SMOLLM2, 1.6),
    Cell("jensen_shannon", SMOLLM2, 1.8),
)
OTHERS = tuple(
    Cell(loss, LLAMA, names=("eager", "Liger", "TRL", "CCE", "QuACK", "F.linear"), rounds=3)
    for loss in ("cross_entropy", "forward_kl", "jensen_shannon")
)


class Clock:
    """The time that is left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


@contextlib.contextmanager
def failing(one: runs.Seen) -> Iterator[None]:
    """What an implementation raises becomes its status."""
    try:
        yield
    except Unavailable as reason:
        one.status, one.reason = SKIPPED, str(reason)
    except ImportError as error:
        one.status, one.reason = SKIPPED, f"not installed ({error})"
    except Exception as error:
        one.status = OUT_OF_MEMORY if measure.is_out_of_memory(error) else FAILED
        one.reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def measured(case: Case, names: list[str], rounds: int, clock: Clock) -> dict[str, runs.Seen]:
    """Each implementation's peak and times; what the time does not allow is `timed out`."""
    table, seen = everyone(), {name: runs.Seen() for name in names}
    torch._dynamo.reset()  # which runs what it has compiled for eight shapes without compiling it
    measure.give_back()
    x = Inputs.make(case, 0)
    race = measure.Race(case, [x])
    calls: dict[str, Callable[[Inputs], Any]] = {}
    for name in names:
        if clock.left() < LEAST:
            seen[name].status, seen[name].reason = TIMED_OUT, "no time was left"
            continue
        with failing(seen[name]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calls[name] = table[name].prepare(case)
            measure.warm_up(case, table[name], calls[name], x)
            seen[name].peak = measure.peak_bytes(case, calls[name], x)
        x.forget_gradients()
        if seen[name].status not in (OK, SKIPPED):
            calls.pop(name, None)
            measure.give_back()
    for number in range(rounds):
        for name in measure.turned(list(calls), number):
            if number and clock.left() < 1.0:
                break
            with failing(seen[name]):
                seen[name].rounds[number] = race.bare(number), race.call(calls[name], number)
            if seen[name].status != OK:
                calls.pop(name)
    return seen


def host(device: str, calls: int, names: list[str]) -> dict[str, float]:
    """Median milliseconds that a call, forward and backward, keeps the host; the GPU is waited for in between."""
    case = Case(HOST if device == "cuda" else TINY, "bfloat16", "cross_entropy", "both", device)
    x, found = Inputs.make(case, 0), {}
    for name in names:
        with contextlib.suppress(Exception):  # who does not run here is said in the first table
            call = everyone()[name].prepare(case)
            took = []
            for _ in range(calls + 10):
                x.forget_gradients()
                begun = time.perf_counter()
                call(x).backward()
                took.append(1e3 * (time.perf_counter() - begun))
                if device == "cuda":
                    torch.cuda.synchronize()
            found[name] = statistics.median(took[10:])
    return found


def line(row: tables.Row, cell: Cell) -> str:
    """A row as it is printed: time, ratio, memory, and the bar of ours."""
    if row.status != OK or row.rounds == 0:
        return f"  {row.implementation:30s} {row.status}: {' '.join(row.reason.split())[:160]}"
    bar = cell.narrow_bar if row.implementation == NARROW else cell.bar if row.ours else None
    said = "" if bar is None else f"  bar {bar:.2f}: {'met' if row.over_floor <= bar else 'MISSED'}"
    memory = tables.number(row.peak_bytes / (1 << 30), ".2f", " GiB")
    if row.ours and cell.gib is not None and row.implementation != NARROW:
        memory += f" ({cell.gib} at most: {'met' if row.peak_bytes <= cell.gib * (1 << 30) else 'MISSED'})"
    spread = f"({row.over_floor_low:.2f}..{row.over_floor_high:.2f})"
    return f"  {row.implementation:30s} {row.ms:9.2f} ms {row.over_floor:6.2f} x floor {spread} {memory}{said}"


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--limit", type=float, default=70.0, help="seconds (default: %(default).0f)")
    options.add_argument("--out", type=Path, default=Path("."), help="folder of timings.csv and bars.txt")
    options.add_argument("--trace", type=Path, help="instead: a profile of one step of forward KL, .json.gz")
    options.add_argument("--commit", help="what is measured, where git cannot say")
    options.add_argument("--calls", type=int, default=1000, help="of the host time (default: %(default)d)")
    options.add_argument("--dry-run", action="store_true", help="tiny, on a CPU, nothing compiled")
    given = options.parse_args(arguments)
    device = "cpu" if given.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("timings: torch must see a GPU, got none. Try --dry-run.")
        return 1
    if device == "cuda":
        BACKENDS[EXPONENTIAL.removeprefix(OURS)] = CudaBackend("exponential")
    clock = Clock(given.limit)
    if given.trace:
        shape = TINY if given.dry_run else LLAMA
        case = Case(shape, "bfloat16", "forward_kl", "both", device)
        name = selection.trace(case, EVERYBODY, given.trace)
        print(f"a trace of {name}, {case}, is in {given.trace}")
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    rows: list[tables.Row] = []
    with (given.out / "bars.txt").open("w") as file:

        def say(text: str) -> None:
            print(text, flush=True)
            print(text, file=file, flush=True)

        about = runs.about(device, given.commit)
        say(f"{about['machine']}, torch {about['torch']}, commit {about['commit']}")
        for cell in (*CELLS, None, *LATER[:3], OTHERS[0]) if given.dry_run else (*CELLS, None, *LATER, *OTHERS):
            if cell is None:
                if clock.left() >= LEAST:
                    _say_host(device, given, say)
                continue
            shape = TINY if given.dry_run else cell.shape
            case = Case(shape, "bfloat16", cell.loss, "both", device)
            if clock.left() < LEAST:
                say(f"{case}: NOT REACHED")
                continue
            wanted = tuple(EAGER.name if given.dry_run and name == COMPILED else name for name in cell.names)
            table = _few() if given.dry_run else everyone()
            names = [n for n, each in table.items() if n.startswith(wanted) and cell.loss in each.losses]
            if cell.loss != "cross_entropy":
                names = [n for n in names if n != EXPONENTIAL]
            begun = time.monotonic()
            try:
                seen = measured(case, names, 1 if given.dry_run else cell.rounds, clock)
            except Exception as error:  # the floor or the inputs do not fit
                say(f"{case}: FAILED, {type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
                continue
            new = runs.rows_of(case, seen, {}, about)
            rows += new
            tables.write(given.out / "timings.csv", tables.merged([], rows))
            floor = statistics.median(r.floor_ms for r in new if r.rounds) if any(r.rounds for r in new) else 0.0
            say(f"{case}: floor {floor:.2f} ms; {time.monotonic() - begun:.0f} s")
            for row in sorted(new, key=lambda row: (row.status != OK, row.ms)):
                if row.status != SKIPPED or cell is CELLS[0] or cell in OTHERS:  # who does not run here is said once
                    say(line(row, cell))
    missing = not any(row.ours and row.status == OK for row in rows)
    return 1 if missing else 0


def _few() -> dict[str, Implementation]:
    """Of a dry run: nothing that compiles itself, and of ours what is for a CPU."""
    ours = (OURS + "native", NARROW)
    return {name: each for name, each in everyone().items() if not each.compiled and (not each.ours or name in ours)}


def _say_host(device: str, given: argparse.Namespace, say: Callable[[str], None]) -> None:
    known = _few() if given.dry_run else everyone()
    found = host(device, given.calls, [name for name in (*EVERYBODY, EAGER.name) if name in known])
    say(f"host time of a call, cross-entropy, {HOST}, median of {given.calls}")
    for name, ms in found.items():
        ours = name.startswith("dft_kernels")
        said = f"  bar {HOST_BAR:.2f}: {'met' if ms <= HOST_BAR else 'MISSED'}" if ours else ""
        say(f"  {name:30s} {ms:9.3f} ms{said}")


if __name__ == "__main__":
    sys.exit(main())
