"""The rows of a call that are in play, and how they are cut into chunks.

The only place that looks at the values of labels and groups, at the one host synchronisation there is, before
any product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from . import backends
from .problem import Problem
from .teachers import Rows

SCRATCH_BYTES = {"cpu": 512 << 20, "cuda": 1536 << 20}  # default memory_budget
SCRATCH_BYTES_ELSEWHERE = 512 << 20
_EVEN = 32  # rows a chunk are a multiple of this: backends pad to it


@dataclass(frozen=True)
class Selection:
    """The rows in play."""

    index: Tensor | None  # [count], the rows that are visited; None: all
    count: int
    weight: Tensor | None  # [N] in the accumulation dtype, 0 for ignored rows; None: 1 for all that are visited
    group: Tensor | None  # [N], inside 0..G-1 wherever visited
    ignored: Tensor | None  # [N], where ignored rows are visited (`compact=False`)
    denominator: Tensor  # 0-d, never 0

    def blocks(self, size: int) -> list[Rows]:
        """Chunks of `size` rows, in order."""
        starts = range(0, self.count, max(1, size))
        ends = [min(start + size, self.count) for start in starts]
        return [Rows(a, b, None if self.index is None else self.index[a:b]) for a, b in zip(starts, ends, strict=True)]

    def group_weight(self, problem: Problem) -> Tensor:
        """The sum of the visited rows' weights in each group, [G]."""
        rows = Rows(0, self.count, self.index)
        ones = problem.hidden.new_ones(problem.hidden.shape[0], dtype=problem.dtype)
        weight = rows.take(ones if self.weight is None else self.weight)
        if self.group is None:
            return weight.sum().view(1)
        groups = torch.arange(problem.num_groups, device=weight.device)[:, None]
        return torch.where(rows.take(self.group) == groups, weight, 0.0).sum(1)


def select_rows(problem: Problem) -> Selection:
    """Drop ignored rows, check label and group values, find the denominator. One synchronisation with the
    device at most; none with `compact=False`, where labels and groups on a device are taken at their word."""
    rows, device, group = problem.hidden.shape[0], problem.hidden.device, problem.group
    index = ignored = None
    count, weight = rows, None if problem.row_weight is None else problem.row_weight.to(problem.dtype)
    looks = problem.compact or device.type == "cpu"
    if problem.target is not None:
        valid = problem.target != problem.ignore_index
        if looks:
            wrong = valid & ((problem.target < 0) | (problem.target >= problem.vocab))
            stray = torch.zeros_like(valid) if group is None else valid & ((group < 0) | (group >= problem.num_groups))
            count, *bad = torch.stack([valid.sum(), wrong.sum(), stray.sum()]).tolist()
            if bad[0]:
                _refuse_value("target", problem.target, wrong, f"labels in 0..{problem.vocab - 1}", problem)
            if bad[1]:
                assert group is not None
                _refuse_value("group", group, stray, f"groups in 0..{problem.num_groups - 1}", problem)
        if count == rows and looks:
            pass
        elif problem.compact:
            index = torch.argsort(valid.to(torch.uint8), stable=True, descending=True)[:count]
            weight = None if weight is None else torch.where(valid, weight, 0.0)
        else:
            count, ignored = rows, ~valid
            weight = valid.to(problem.dtype) if weight is None else torch.where(valid, weight, 0.0)
            group = None if group is None else torch.where(valid, group, 0)
    elif group is not None and looks:
        stray = (group < 0) | (group >= problem.num_groups)
        if bool(stray.any()):
            _refuse_value("group", group, stray, f"groups in 0..{problem.num_groups - 1}", problem)
    return Selection(index, count, weight, group, ignored, _denominator(problem, count, weight))


def _denominator(problem: Problem, count: int, weight: Tensor | None) -> Tensor:
    """What the sum of row losses is divided by: 1 where that would be 0."""
    device = problem.hidden.device
    if problem.num_items is not None:
        if problem.num_items.device.type == "cpu":
            return torch.full((), float(problem.num_items), dtype=problem.dtype, device=device)
        return problem.num_items.to(problem.dtype, copy=True)  # an operator may not return its argument
    if problem.reduction != "mean":
        return torch.ones((), dtype=problem.dtype, device=device)
    if weight is None:
        return torch.full((), max(1, count), dtype=problem.dtype, device=device)
    total = weight.sum()
    return torch.where(total == 0, 1.0, total)


def _refuse_value(argument: str, values: Tensor, wrong: Tensor, relation: str, problem: Problem) -> NoReturn:
    row = int(wrong.nonzero()[0])
    ignore = f" or {problem.ignore_index} (ignore_index)" if argument == "target" else ""
    raise ValueError(
        f"dft_kernels: {argument} must hold {relation}{ignore}, got {int(values[row])} at row {row} of "
        f"{values.shape[0]}. Check that labels and head belong to one tokenizer."
    )


def scratch_bytes(device: torch.device) -> int:
    """The default of `memory_budget` on `device`."""
    return SCRATCH_BYTES.get(device.type, SCRATCH_BYTES_ELSEWHERE)


def most_rows(problem: Problem) -> int:
    """The largest chunk: `chunk_size`, else what fits the budget, up to where the backend gains no more."""
    if problem.chunk_size is not None:
        return problem.chunk_size
    backend = backends.choose(problem.backend, problem.hidden.device, problem.hidden.dtype)
    row_bytes = (
        backend.chunk_bytes(problem.hidden.dtype, problem.weight is not None, problem.target_bytes) * problem.vocab
    )
    budget = problem.memory_budget or scratch_bytes(problem.hidden.device)
    rows = max(1, min(backend.best_rows, budget // row_bytes))
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
