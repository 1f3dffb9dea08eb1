"""A process that measures and reports each result at once, so that a crash loses nothing but its own measurement."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import measure
from .floor import Clock, ceilings, floor_dtype
from .implementations import Call, Implementation, Unavailable
from .inputs import Inputs
from .problems import Case

SKIPPED, OUT_OF_MEMORY, FAILED, TIMED_OUT, OK = "skipped", "out of memory", "failed", "timed out", "ok"
SLOWER = "a call took longer than"  # and how many s
EXACT = "float64"  # what `begin` names while the oracle runs
SLOW = 5.0  # seconds of a first call after which no second one comes before the rounds


class Job(NamedTuple):
    """What a worker does for one case."""

    case: Case
    names: tuple[str, ...]  # of implementations
    memory: bool
    times: bool
    errors: bool
    rounds: int
    limit: float  # seconds of a call, after which its implementation is left out; and of an implementation's rounds
    memory_limit: int  # bytes
    table: Callable[[], dict[str, Implementation]]  # whose names these are
    file: Path | None = None  # of inputs that are not random


class Event(NamedTuple):
    """What a worker says: what it begins, and what it found. Between `compiling` and `compiled` no call counts."""

    kind: str  # begin, call, compiling, compiled; status, peak, time, done, errors, machine, remark (what is amiss)
    name: str  # of the implementation, "" for the case
    value: Any = None


def run(job: Job, say: Callable[[Event], None]) -> None:
    """Measure; every finding goes to `say`."""
    measure.limit_memory(job.memory_limit, job.case.device)
    calls: dict[str, Call] = {}
    table = job.table()

    def attempt(name: str, action: Callable[[], Any], limited: bool = True) -> Any:
        """The action's result, or None where it fails; then that implementation is measured no further, or none is
        where the failure is not of one of them. A named action is one call of the implementation; limited: within
        `job.limit`."""
        say(Event("call" if name and limited else "begin", name))
        try:
            return action()
        except Exception as error:  # a peer's own failure on this machine is a result
            text = _brief(error)
            status = OUT_OF_MEMORY if measure.is_out_of_memory(error) else FAILED
        for loser in [name] if name else list(calls):
            calls.pop(loser)
            say(Event("status", loser, (status, text)))
        measure.give_back()  # where a GPU can do no more, this process ends here, and another goes on
        return None

    for name in job.names:
        say(Event("begin", name))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                calls[name] = table[name].prepare(job.case)
        except Unavailable as error:
            say(Event("status", name, (SKIPPED, str(error))))
        except ImportError as error:
            say(Event("status", name, (SKIPPED, f"not installed ({error}): pip install 'dft-kernels[bench]'")))
        except Exception as error:  # raised by an import that does not suit this machine
            say(Event("status", name, (SKIPPED, f"{type(error).__name__}: {error}")))
    if any(table[name].compiled for name in calls):
        _tell_of_compilation(say)
    if job.memory:
        x = attempt("", partial(Inputs.make, job.case, 0, job.file))
        tunes = job.case.device == "cuda"  # in its first call, without a word
        for name in list(calls):
            attempt(name, partial(measure.warm_up, job.case, table[name], calls[name], x), limited=not tunes)
            if name in calls:
                peak = attempt(name, partial(measure.peak_bytes, job.case, calls[name], x))
            x.forget_gradients()
            if name in calls:
                say(Event("peak", name, peak))
        del x
        measure.give_back()
    if job.times and calls:
        _time(job, calls, attempt, say)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _tell_of_compilation(say: Callable[[Event], None]) -> None:
    from torch._dynamo.callback import on_compile_end, on_compile_start

    on_compile_start(lambda _: say(Event("compiling", "")))
    on_compile_end(lambda _: say(Event("compiled", "")))


def _time(job: Job, calls: dict[str, Call], attempt: Callable[..., Any], say: Callable[[Event], None]) -> None:
    case = job.case
    sets = attempt("", partial(measure.input_sets, case, job.memory_limit, job.file))
    dtype: Any = attempt("", partial(floor_dtype, case, sets[0])) if calls else None
    clock, table = Clock(case.device), job.table()
    exact = None
    if calls:
        say(Event("machine", "", {"floor_dtype": str(dtype).removeprefix("torch.")}))
        try:
            say(Event("machine", "", ceilings(case, dtype)))
        except (MemoryError, RuntimeError) as error:
            say(Event("remark", "", f"no ceilings: {_brief(error)}"))
    if calls and job.errors and case.part == "both":
        say(Event("begin", EXACT))
        try:
            exact = measure.Exact(case, sets[0])
        except (MemoryError, RuntimeError) as error:
            say(Event("remark", "", f"no errors, float64 does not fit: {_brief(error)}"))
    rounds: dict[str, int] = {}
    for name in list(calls):
        started = time.perf_counter()
        if exact is not None:
            say(Event("call", name))
            with suppress(Exception):  # if it is the implementation that fails, it fails again below
                loss = exact.called(calls[name])
                say(Event("begin", name))
                say(Event("errors", name, exact.errors(loss)))
            if exact.rows != case.shape.n and table[name].compiled:
                torch._dynamo.reset()  # or the full size would run as the second of many
                _tell_of_compilation(say)
        if exact is None or exact.rows != case.shape.n:
            attempt(name, partial(measure.timed, case, calls[name], sets[0], clock))
        first = 1e3 * (time.perf_counter() - started)
        prepares = table[name].compiled or case.device == "cuda"  # its first call says nothing of the next
        if name in calls and (prepares or first < 1e3 * SLOW):
            first = attempt(name, partial(measure.timed, case, calls[name], sets[-1], clock))
        if name in calls:
            rounds[name] = measure.rounds_for(first, job.rounds, job.limit)
    for x in sets or ():
        x.forget_gradients()
    del exact
    measure.give_back()
    race: Any = attempt("", partial(measure.Race, case, sets, dtype)) if calls else None
    for number in range(max((rounds[name] for name in calls), default=0)):
        for name in measure.turned(list(calls), number):
            if number < rounds[name]:
                bare = attempt("", partial(race.bare, number))
                took = attempt(name, partial(race.call, calls[name], number)) if name in calls else None
                if name in calls:
                    say(Event("time", name, (number, bare, took)))
                    if number == rounds[name] - 1:
                        say(Event("done", name))


def main(job: Job, connection: Any, log: str) -> None:
    """Entry of the process: what libraries print goes to the file `log`."""
    with open(log, "w") as file:
        sys.stdout.flush()
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        run(job, connection.send)
        connection.send(None)
