"""How a call is run: its backend, and the rows of a chunk."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .. import backends
from ..backends.contract import Backend, Terms
from ..dtypes import accumulate_dtype
from ..teachers.contract import Source
from ..teachers.stream import LogitStream
from .checks import Checks, Fields
from .options import LossOptions
from .problem import Problem

SCRATCH_BYTES = {"cpu": 512 << 20, "cuda": 1536 << 20}  # default memory_budget
SCRATCH_BYTES_ELSEWHERE = 512 << 20
_EVEN = 32  # rows a chunk are a multiple of this: backends pad to it


def _backend(check: Checks, name: Any) -> str:
    if name == "auto":
        return "auto"
    check.choice("backend", name, ("auto", *backends.BACKENDS))
    reason = backends.BACKENDS[name].unavailable(check.hidden.device, check.hidden.dtype)
    if reason is not None:
        where = f"be available for {check.hidden.dtype} on {check.hidden.device}"
        check.fail("backend", where, f"{name!r}: {reason}", 'Use backend="auto"')
    return name


def _narrow(check: Checks, value: Any) -> bool:
    """Whether logits_dtype asks for logits in the input dtype, where that is not the accumulation dtype."""
    if value is None:
        return False
    own, wide = check.hidden.dtype, accumulate_dtype(check.hidden.dtype)
    if value == wide:
        return False
    if value != own:
        relation = f"be None, {wide}, or the dtype of {check.names[0]}"
        kind = ValueError if isinstance(value, torch.dtype) else TypeError
        check.fail("logits_dtype", relation, repr(value), "Leave it out for exact gradients", kind)
    return True


def _gradient_error(check: Checks, options: LossOptions) -> float | None:
    value = options["gradient_error"]
    if value is None:
        return None
    relation = "be None or lie between 0 and 1, both excluded"
    error = check.number("gradient_error", value, relation, lambda x: 0 < x < 1)
    if options["reduction"] == "none":
        remedy = "Use a scalar reduction, or leave gradient_error out"
        check.fail("gradient_error", "come with reduction='mean' or 'sum'", "reduction='none'", remedy)
    if check.shards is not None:
        remedy = "Leave gradient_error out"
        check.fail("gradient_error", "come with a vocabulary that is whole in this process", "a part of it", remedy)
    return error


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
        "gradient_error": _gradient_error(check, options),
        "narrow": _narrow(check, options["logits_dtype"]),
        "compact": bool(options["compact"]),
    }


def check_plan(check: Checks, problem: Problem, teacher: Any, recomputes: bool) -> None:
    """That a row of logits fits the budget, and that a stream can be read as often as the call needs it.
    recomputes: backward computes the chunks' logits again."""
    if problem.memory_budget is not None and problem.memory_budget < (row := row_bytes(problem)):
        relation = f"be at least {row} bytes (one row of {problem.widest_vocab} logits)"
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


def row_bytes(problem: Problem, backend: Backend[Any] | None = None) -> int:
    """Scratch bytes for the logits of one row. backend: that of the problem, where it is known."""
    projected, target = problem.weight is not None, problem.target_bytes
    chosen = backend or backends.choose(problem.backend, problem.hidden.device, problem.hidden.dtype)
    return chosen.chunk_bytes(problem.logits_dtype, projected, target) * problem.widest_vocab


class Plan(NamedTuple):
    """rows: of a chunk. kept: rows whose dlogits [kept, V] are kept, in the input dtype, until one product adds their
    share of dweight; 0: each chunk's are multiplied at once, and take the memory of its logits."""

    rows: int
    kept: int = 0

    def products(self, count: int) -> int:
        """How many products dweight is the sum of."""
        return math.ceil(count / max(self.rows, self.kept))


def plan(problem: Problem, backend: Backend[Any], count: int, terms: Terms | None = None) -> Plan:
    """How `count` rows are run by the problem's backend; terms: of a gradient, None: there is none. Alike in all
    processes that a vocabulary lies over.

    Chunks are as large as the budget admits, up to where the backend gains no more, and of a number of rows that its
    products like. Where several chunks remain, dlogits of all rows are kept for a single product of dweight, straight
    into its dtype, if they take no more than the accumulator [V, H] that it would else be summed in, or fit the budget
    beside a chunk.
    """
    budget = problem.memory_budget or scratch_bytes(problem.hidden.device)
    if terms is not None and backend.holds(terms, problem.hidden) != terms.logits_dtype:
        problem = problem._replace(narrow=True)
    row = row_bytes(problem, backend)

    def most(bytes_of_row: int, within: int) -> int:
        if problem.chunk_size is not None or bytes_of_row == 0:
            return problem.chunk_size or count
        return _rounded(min(backend.best_rows, within // bytes_of_row), backend.even_rows)

    alone = most(row, budget)
    if count <= alone:
        return Plan(max(1, count))
    keeps = terms is not None and backend.keeps and not terms.active
    if keeps and problem.weight is not None and problem.need_weight and problem.folds:
        itemsize, vocab = problem.hidden.dtype.itemsize, problem.widest_vocab
        kept, accumulator = itemsize * vocab * count, problem.dtype.itemsize * problem.weight.shape[1] * vocab
        beside = row - itemsize * vocab if problem.narrow else row  # narrow logits are where their dlogits are kept
        free = kept <= accumulator
        rows = most(beside, budget - kept)
        if free:  # few rows lose little where dweight is one product, and take little beside what is kept
            rows = max(rows, min(backend.even_rows, most(beside, budget)))
        if free or (kept < budget and rows >= backend.even_rows):
            if rows >= count:
                return Plan(count)
            return Plan(_even(problem, count, rows, backend.even_rows), count)
    return Plan(_even(problem, count, alone, backend.even_rows))


def _rounded(rows: int, even: int) -> int:
    """Down to a multiple of `even`, or of a smaller power of two; at least 1."""
    while even > 1 and rows < even:
        even //= 2
    return max(1, rows // even * even)


def _even(problem: Problem, count: int, most: int, even: int) -> int:
    """At most `most` rows a chunk; where the planner is free, as even as multiples of `even` are."""
    if problem.chunk_size is not None or most < _EVEN:
        return max(1, min(count, most))
    spread = math.ceil(count / math.ceil(count / most))
    step = even if most % even == 0 else _EVEN
    return min(most, math.ceil(spread / step) * step)
