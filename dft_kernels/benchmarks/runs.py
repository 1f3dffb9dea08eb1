"""Cases to rows: starts the workers, survives them, and keeps what they say."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .implementations import EAGER, Implementation
from .peers import everyone
from .problems import Case
from .tables import Row
from .worker import EXACT, FAILED, OK, OUT_OF_MEMORY, SLOWER, TIMED_OUT, Event, Job, main

WRONG = 0.2  # relative error of a gradient that no rounding explains,
FAR = 0.1  # where the teacher is at least this KL from the model: nearer ones are spoilt by rounding alone

PATIENCE = 300.0  # seconds for anything but a call: libraries that load, inputs, float64, a compiler
SPAWN_TIMED = True  # processes that are timed are not forked; tests have no time to measure


@dataclass
class Seen:
    """What is known of one implementation in one case."""

    status: str = OK
    reason: str = ""
    peak: int | None = None
    errors: dict[str, Any] = field(default_factory=dict)
    rounds: dict[int, tuple[float, float]] = field(default_factory=dict)  # floor and implementation, ms


def available_memory() -> int:
    """Bytes of memory that programs can still take, by the kernel and by this control group."""
    free = [1 << 40]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        free.append(int(line.split()[1]) * 1024)
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and limit.read_text().strip().isdigit():
        held = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
        cache = int(held.get("inactive_file", 0))  # of files, given back when wanted
        free.append(int(limit.read_text()) - int(used.read_text()) + cache)
    return min(free)


def default_limit(device: str) -> int:
    """Bytes that a worker may take: 80 % of what is available."""
    return int(0.8 * (torch.cuda.mem_get_info()[0] if device == "cuda" else available_memory()))


def commit() -> str:
    """The commit that is measured; "+" if the tree has changes; the version where there is no repository."""
    from .. import __version__

    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return __version__


def processor() -> str:
    """The name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def instructions() -> str:
    """The instruction set that torch's kernels use here, and whether it was told to."""
    told = " by ATEN_CPU_CAPABILITY" if "ATEN_CPU_CAPABILITY" in os.environ else ""
    return torch.backends.cpu.get_cpu_capability() + told


def machine(device: str) -> str:
    """What the numbers belong to."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' * (threads > 1)}, {instructions()}"


class Patience:
    """How long a worker may say nothing, by what it said last: `PATIENCE`; in a call the limit, to which what the call
    compiles is not counted."""

    def __init__(self, limit: float) -> None:
        self.limit, self.left, self.doing, self.since = limit, limit, "begin", 0.0

    def hear(self, kind: str, now: float) -> float:
        """Seconds from now on."""
        if kind == "compiling" and self.doing == "call":
            self.left -= now - self.since
        elif kind == "call":
            self.left = self.limit
        self.doing, self.since = "call" if kind == "compiled" else kind, now
        return max(self.left, 0.0) if self.doing == "call" else PATIENCE

    def lost(self) -> str:
        """Why the worker was given up."""
        if self.doing == "call":
            return f"{SLOWER} {self.limit:g} s"
        return f"{'compiled' if self.doing == 'compiling' else 'said nothing'} for {PATIENCE:.0f} s"


def watch(job: Job, hear: Callable[[Event], None]) -> tuple[str, str] | None:
    """Run one worker; None if it came to its end, else the status and the reason of its death."""
    # Forked from a server that has torch and no threads: sooner, and as fresh. What is timed, and CUDA's, is spawned.
    forked = job.case.device == "cpu" and sys.platform == "linux" and not (job.times and SPAWN_TIMED)
    context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
    if forked:
        context.set_forkserver_preload([main.__module__])
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = context.Process(target=main, args=(job, sender, log.name), daemon=True)
        process.start()
        sender.close()
        patience, wait = Patience(job.limit), PATIENCE
        try:
            while receiver.poll(wait):
                event = receiver.recv()
                if event is None:
                    process.join(10)  # a library's thread may keep it
                    return None
                wait = patience.hear(event.kind, time.monotonic())
                hear(event)
            return TIMED_OUT, patience.lost()
        except EOFError:
            process.join()
            last = next(
                (line for line in reversed(Path(log.name).read_text(errors="replace").splitlines()) if line), ""
            )
            if process.exitcode == -9:
                return OUT_OF_MEMORY, "killed by the system"
            return FAILED, f"the process ended with {process.exitcode}: {last[:300]}"
        finally:
            process.kill()
            process.join()
            receiver.close()


def measure_case(
    case: Case, names: list[str], *, rounds: int, limit: float, memory_limit: int, errors: bool,
    progress: Callable[[str], None], found: Callable[[str, Seen], None],
    table: Callable[[], dict[str, Implementation]] = everyone, file: Path | None = None,
    known: Mapping[str, Seen] | None = None,
) -> tuple[dict[str, Seen], dict[str, Any]]:  # fmt: skip
    """What is seen of every implementation, and of the machine: its ceilings, the dtype of the floor. found: told of
    each implementation when its memory is known, and when all of it is. file: of inputs that are not random; known: of
    implementations whose peak or whose status is known before."""
    seen = {name: replace(known[name]) if known and name in known else Seen() for name in names}
    machine: dict[str, Any] = {}
    remarks: list[str] = []

    def alive() -> tuple[str, ...]:
        return tuple(name for name in names if seen[name].status == OK)

    def lose(name: str, status: str, reason: str) -> None:
        seen[name].status, seen[name].reason = status, reason
        found(name, seen[name])

    def attend(wanted: tuple[str, ...], memory: bool, time: bool) -> None:
        nonlocal errors
        while wanted:
            job = Job(case, wanted, memory, time, errors, rounds, limit, memory_limit, table, file)
            now = ""
            for name in wanted if time else ():
                seen[name].rounds.clear()

            def hear(event: Event) -> None:
                nonlocal now
                if event.kind in ("begin", "call"):
                    now = event.name
                    progress(f"{'memory' if memory and not time else 'time'} of {now or 'the floor'}")
                elif event.kind == "machine":
                    machine.update(event.value)
                elif event.kind == "remark":
                    remarks.append(event.value)
                elif event.name in seen:
                    one = seen[event.name]
                    if event.kind == "status":
                        lose(event.name, *event.value)
                    elif event.kind == "peak":
                        one.peak = event.value
                        found(event.name, one)
                    elif event.kind == "errors":
                        one.errors = event.value
                        worst = max(event.value["dhidden"], event.value["dweight"])
                        if not worst < WRONG and not 0 < case.distance < FAR:
                            lose(event.name, FAILED, f"its gradient is off by {worst:.0%}: not this loss's")
                    elif event.kind == "time":
                        one.rounds[event.value[0]] = event.value[1:]
                    elif event.kind == "done" and one.status == OK:
                        found(event.name, one)

            death = watch(job, hear)
            if death is None:
                return
            if now == EXACT and errors:
                errors = False
                remarks.append(f"no errors, float64 does not fit: {death[1]}")
                continue
            for name in [now] if now else wanted:  # what died takes nobody along
                lose(name, *death)
            wanted = tuple(name for name in wanted if seen[name].status == OK)

    for name in names:
        if seen[name].status != OK:
            found(name, seen[name])
    if case.device == "cuda":  # its allocator counts each call exactly, so one process serves for all of it
        attend(alive(), memory=True, time=True)
    else:
        attend(alive(), memory=False, time=False)  # who does not run here needs no process of its own
        for name in alive():
            if seen[name].peak is None:
                attend((name,), memory=True, time=False)
        attend(alive(), memory=False, time=True)
    for name in alive():
        seen[name].reason = "; ".join(dict.fromkeys(remarks))
    return seen, machine


def rows_of(
    case: Case, seen: dict[str, Seen], machine: dict[str, Any], about: dict[str, Any], teacher_kl: float = math.nan
) -> list[Row]:
    """The table of a case: medians over rounds, of ratios taken within each."""
    table = everyone()
    times = {
        name: {number: pair[1] for number, pair in one.rounds.items()}
        for name, one in seen.items()
        if one.status == OK and one.rounds
    }
    rivals = {name: statistics.median(of.values()) for name, of in times.items() if not table[name].ours}
    best = min(rivals, key=lambda name: rivals[name], default=None)

    def over(name: str, other: str | None) -> float:
        if other not in times:
            return math.nan
        common = [times[name][number] / ms for number, ms in times[other].items() if number in times[name]]
        return statistics.median(common) if common else math.nan

    rows = []
    for name, one in seen.items():
        measured: dict[str, Any] = dict(machine)
        if name in times:
            bare, whole = zip(*one.rounds.values(), strict=True)
            ratio = [mine / floor for floor, mine in one.rounds.values()]
            measured |= {
                "rounds": len(whole), "ms": statistics.median(whole), "ms_low": min(whole), "ms_high": max(whole),
                "floor_ms": statistics.median(bare), "over_floor": statistics.median(ratio),
                "over_floor_low": min(ratio), "over_floor_high": max(ratio),
                "over_eager": over(name, EAGER.name), "over_best_peer": over(name, best),
            }  # fmt: skip
        peak = one.peak if one.peak is not None else math.nan
        measured |= {f"error_{what}": error for what, error in one.errors.items()}
        rows.append(
            Row(
                **about, device=case.device, n=case.shape.n, h=case.shape.h, v=case.shape.v, dtype=case.dtype,
                loss=case.loss, part=case.part, implementation=name, package=table[name].version(),
                status=one.status, reason=one.reason, peak_bytes=peak, inputs=case.inputs, distance=case.distance,
                teacher_kl=teacher_kl, **measured,
            )
        )  # fmt: skip
    return rows


def about(device: str, measured: str | None = None) -> dict[str, Any]:
    """The columns that are the same in all rows of a run; `measured`: the commit, where git cannot say."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": measured or commit(),
        "machine": machine(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
