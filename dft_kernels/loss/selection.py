"""The rows of a call that are in play, and how they are cut into chunks.

The only module that reads the values of labels and groups, at the one host synchronisation there is, before any
product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..backends.extension import all_labels, repeats
from ..teachers.contract import Rows
from ..teachers.top_k import TopK
from .problem import Problem


@dataclass(frozen=True)
class Selection:
    """The rows in play."""

    index: Tensor | None  # [count], the rows that are visited; None: all
    count: int
    weight: Tensor | None  # [N] in the accumulation dtype, 0 for ignored rows; None: 1 for all that are visited
    group: Tensor | None  # [N], inside 0..G-1 wherever visited
    ignored: Tensor | None  # [N], where ignored rows are visited (`compact=False`)
    denominator: float | Tensor  # never 0; a 0-d tensor where only the device knows it

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
    """Drop ignored rows, check the values of labels, groups and sparse targets, find the denominator. One
    synchronisation with the device at most; none with `compact=False`, where values on a device are taken at their
    word."""
    rows, device, group = problem.hidden.shape[0], problem.hidden.device, problem.group
    index = ignored = None
    count, weight = rows, None if problem.row_weight is None else problem.row_weight.to(problem.dtype)
    looks = problem.compact or device.type == "cpu"
    if group is None and problem.top is None and all_labels(problem.target, problem.whole_vocab, problem.ignore_index):
        return Selection(None, rows, weight, None, None, _denominator(problem, rows, weight))
    valid = None if problem.target is None else problem.target != problem.ignore_index
    faults = _faults(problem, valid) if looks else []
    if faults:
        of_interest = [fault.rows for fault in faults] if valid is None else [valid, *(fault.rows for fault in faults)]
        found = torch.stack([mask.sum() for mask in of_interest]).tolist()
        for fault, wrong in zip(faults, found[-len(faults) :], strict=True):
            if wrong:
                _refuse(fault, rows)
        count = rows if valid is None else found[0]
    if valid is None or (count == rows and looks):
        pass
    elif problem.compact:
        index = torch.argsort(valid.to(torch.uint8), stable=True, descending=True)[:count]
        weight = None if weight is None else torch.where(valid, weight, 0.0)
    else:
        count, ignored = rows, ~valid
        weight = valid.to(problem.dtype) if weight is None else torch.where(valid, weight, 0.0)
        group = None if group is None else torch.where(valid, group, 0)
    return Selection(index, count, weight, group, ignored, _denominator(problem, count, weight))


class _Fault(NamedTuple):
    """Rows whose values of an argument are wrong [N] bool, what they must be, and how to show one."""

    rows: Tensor
    argument: str
    relation: str
    got: Callable[[int], str]
    remedy: str


def _faults(problem: Problem, valid: Tensor | None) -> list[_Fault]:
    """What may be wrong with values, for every row in play."""
    target, group, faults = problem.target, problem.group, []
    if target is not None:
        relation = f"hold labels in 0..{problem.whole_vocab - 1} or {problem.ignore_index} (ignore_index)"
        wrong = (target < 0) | (target >= problem.whole_vocab)
        remedy = "Check that labels and head belong to one tokenizer"
        faults.append(_Fault(wrong, "target", relation, lambda row: str(int(target[row])), remedy))
    if group is not None:
        relation = f"hold groups in 0..{problem.num_groups - 1}"
        wrong = (group < 0) | (group >= problem.num_groups)
        faults.append(_Fault(wrong, "group", relation, lambda row: str(int(group[row])), "Check num_groups"))
    if problem.top is not None:
        faults += _top_faults(problem.top, problem.whole_vocab, problem.dtype)
    return faults if valid is None else [fault._replace(rows=fault.rows & valid) for fault in faults]


def _top_faults(top: TopK, vocab: int, dtype: torch.dtype) -> list[_Fault]:
    ids, log_p, tail = top.indices, top.log_probs.to(dtype), top.tail_log_prob
    p = log_p.exp()
    total = p.sum(-1)
    rounding = torch.finfo(top.log_probs.dtype).eps * (p * (1.0 - log_p.clamp(min=-1e4))).sum(-1) + 1e-5
    too_much, relation = total > 1.0 + rounding, "sum to at most 1 in probability"
    if tail is not None:
        total = total + tail.to(dtype).exp()
        rounding = rounding + torch.finfo(tail.dtype).eps
        too_much = ~((total - 1.0).abs() <= rounding)
        relation = "sum to 1 in probability with tail_log_prob"
    return [
        _Fault(
            ((ids < 0) | (ids >= vocab)).any(-1),
            "teacher.indices",
            f"hold ids in 0..{vocab - 1}",
            lambda row: str(int(ids[row][(ids[row] < 0) | (ids[row] >= vocab)][0])),
            "Check that teacher and head belong to one tokenizer, and that a padded vocabulary was sliced at capture",
        ),
        _Fault(
            repeats(ids, vocab),
            "teacher.indices",
            "hold distinct ids in a row",
            lambda row: f"{int(ids[row].mode().values)} twice",
            "Pass what torch.topk returns",
        ),
        _Fault(
            ~(log_p <= 0.0).all(-1),
            "teacher.log_probs",
            "hold logarithms of probabilities, none above 0 or NaN",
            lambda row: str(float(log_p[row].amax())),
            "Pass log_softmax(logits).gather(-1, indices), not logits",
        ),
        _Fault(
            too_much,
            "teacher.log_probs",
            relation,
            lambda row: str(float(total[row])),
            "Take the log-softmax over the whole vocabulary at the temperature of capture before the k are picked",
        ),
    ]


def _refuse(fault: _Fault, rows: int) -> NoReturn:
    row = int(fault.rows.nonzero()[0])
    raise ValueError(
        f"dft_kernels: {fault.argument} must {fault.relation}, got {fault.got(row)} at row {row} of "
        f"{rows}. {fault.remedy}."
    )


def _denominator(problem: Problem, count: int, weight: Tensor | None) -> float | Tensor:
    """What the sum of row losses is divided by, 1 where that would be 0."""
    items = problem.num_items
    if items is not None:
        if count == 0:  # 0, whatever it is divided by: where no batch of a step has labels, num_items is 0
            return 1.0
        return float(items) if items.device.type == "cpu" else items.to(problem.dtype)
    if problem.reduction != "mean":
        return 1.0
    if weight is None:
        return float(max(1, count))
    total = weight.sum()
    return torch.where(total == 0, 1.0, total)
