"""How a call is run: its backend, and the rows of a chunk."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import backends
from ..teachers.contract import Source
from ..teachers.stream import LogitStream
from .checks import Checks, Fields
from .options import LossOptions
from .problem import Problem

SCRATCH_BYTES = {"cpu": 512 << 20, "cuda": 1536 << 20}  # default memory_budget
SCRATCH_BYTES_ELSEWHERE = 512 << 20
_EVEN = 32  # rows a chunk are a multiple of this: backends pad to it


def _backend(check: Checks, name: Any) -> str:
    check.choice("backend", name, ("auto", *backends.BACKENDS))
    reason = None if name == "auto" else backends.BACKENDS[name].unavailable(check.hidden.device, check.hidden.dtype)
    if reason is not None:
        where = f"be available for {check.hidden.dtype} on {check.hidden.device}"
        check.fail("backend", where, f"{name!r}: {reason}", 'Use backend="auto"')
    return name


def plan_fields(check: Checks, options: LossOptions) -> Fields:
    """The backend and the limits of a chunk, each by itself; `check_plan` holds them against the whole call."""
    chunk_size, memory_budget = options["chunk_size"], options["memory_budget"]
    if chunk_size is not None:
        check.positive_int("chunk_size", chunk_size)
    if memory_budget is not None:
        check.positive_int("memory_budget", memory_budget)
        if chunk_size is not None:
            check.fail("chunk_size", "be None where memory_budget is given", chunk_size, "Give one of the two")
    return {
        "backend": _backend(check, options["backend"]),
        "chunk_size": chunk_size,
        "memory_budget": memory_budget,
        "compact": bool(options["compact"]),
    }


def check_plan(check: Checks, problem: Problem, teacher: Any, recomputes: bool) -> None:
    """That a row of logits fits the budget, and that a stream can be read as often as the call needs it.
    recomputes: backward computes the chunks' logits again."""
    if problem.memory_budget is not None and problem.memory_budget < (row := row_bytes(problem)):
        relation = f"be at least {row} bytes (one row of {problem.vocab} logits)"
        check.fail("memory_budget", relation, problem.memory_budget, "Raise it, or give chunk_size=1")
    if not isinstance(teacher, Source) or teacher.replayable:
        return
    streams = getattr(teacher, "teachers", [teacher])
    if any(isinstance(stream, LogitStream) and not stream.replayable and stream.spent for stream in streams):
        check.fail("teacher", "be an unread stream", "an iterator that was read before", "Make a new LogitStream")
    if problem.needs_gradient and recomputes:
        check.fail(
            "teacher",
            "be replayable where backward recomputes logits (reduction='none', statistics)",
            "a LogitStream over an iterator",
            "Give LogitStream a callable rows -> logits",
        )


def scratch_bytes(device: torch.device) -> int:
    """The default of `memory_budget` on `device`."""
    return SCRATCH_BYTES.get(device.type, SCRATCH_BYTES_ELSEWHERE)


def row_bytes(problem: Problem) -> int:
    """Scratch bytes for the logits of one row."""
    backend = backends.choose(problem.backend, problem.hidden.device, problem.hidden.dtype)
    return backend.chunk_bytes(problem.hidden.dtype, problem.weight is not None, problem.target_bytes) * problem.vocab


def most_rows(problem: Problem) -> int:
    """The largest chunk: `chunk_size`, else what fits the budget, up to where the backend gains no more."""
    if problem.chunk_size is not None:
        return problem.chunk_size
    backend = backends.choose(problem.backend, problem.hidden.device, problem.hidden.dtype)
    budget = problem.memory_budget or scratch_bytes(problem.hidden.device)
    rows = max(1, min(backend.best_rows, budget // row_bytes(problem)))
    return rows if rows < _EVEN else rows // _EVEN * _EVEN


def plan_rows(problem: Problem, count: int) -> int:
    """Rows a chunk for `count` rows: at most `most_rows`; where the planner is free, evenly spread."""
    most = most_rows(problem)
    if count <= most or problem.chunk_size is not None:
        return max(1, min(count, most))
    even = math.ceil(count / math.ceil(count / most))
    return min(most, math.ceil(even / _EVEN) * _EVEN)


def dweight_dtype(problem: Problem) -> torch.dtype:
    """The dtype that dweight is summed in: the accumulation dtype, but bf16 where a single chunk rounds it once
    (fp16 has not the range for an unscaled sum). A matter of shapes alone, so that a traced call knows it."""
    alone = problem.hidden.dtype != torch.float16 and problem.hidden.shape[0] <= most_rows(problem)
    return problem.hidden.dtype if alone else problem.dtype
