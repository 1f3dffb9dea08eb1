"""A sparse teacher: the likeliest tokens of each row, and the probability of all others."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .contract import Rows, SparseTarget

TAILS = ("bucket", "renormalise", "ignore")


@dataclass(frozen=True, eq=False)
class TopK:
    """The k likeliest tokens of each row and the probability of all others: a sparse target.

    indices: [..., k] int64, distinct in a row; log_probs: [..., k], log p of them in the whole distribution
    softmax(teacher logits / temperature); tail_log_prob: [...], log of the mass outside, None: 1 - sum, which
    rounding spoils where the tail is small, so keep it at capture. Leading dimensions follow `hidden`'s.

    tail: the treatment of the mass outside of the k tokens S.

        "bucket"       one outcome more, for target and model alike: D over k + 1 outcomes, the model's tail
                       summed over its tokens. Exact for what is known: a lower bound of D over the whole
                       vocabulary, 0 only where the model agrees on S and on the tail's mass. In S the gradient of
                       forward KL is q - p, outside q (1 - p_tail / q_tail).
        "renormalise"  p / sum of p over S, nothing outside. Biased: draws all of the model's mass into S, and is
                       overconfident by what the tail held; reverse KL would be infinite and is refused.
        "ignore"       sum of the divergence's addends f >= 0 over S alone. Biased low: nothing is asked of how
                       far the tail's mass is off beyond what S says of it.

    Log-probabilities are of the temperature they were captured at: the loss's teacher_temperature must be that one,
    but for "renormalise", where p over S follows any. FLOPs: O(N k) beside the loss; memory: O(chunk k).
    """

    indices: Tensor
    log_probs: Tensor
    tail_log_prob: Tensor | None = None
    temperature: float = 1.0
    tail: str = "bucket"


@contextmanager
def open_top_k(top: TopK, temperature: float, dtype: torch.dtype, blocks: Sequence[Rows]) -> Generator[Iterator[Any]]:
    """Sparse targets of `blocks` at `temperature`: log p over the outcomes, which sum to 1 (but for "ignore")."""
    yield (_sparse(top, rows, temperature, dtype) for rows in blocks)


def _sparse(top: TopK, rows: Rows, temperature: float, dtype: torch.dtype) -> SparseTarget:
    index, log_p = rows.take(top.indices), rows.take(top.log_probs).to(dtype)
    if top.tail == "renormalise":
        log_p = (log_p * (top.temperature / temperature)).log_softmax(-1)
        return SparseTarget(index, log_p, log_p.new_full((len(log_p),), -torch.inf))
    if top.tail == "ignore":
        return SparseTarget(index, log_p, None)
    if top.tail_log_prob is None:
        return SparseTarget(index, log_p, torch.log1p(-log_p.exp().sum(-1).clamp(max=1.0)))
    tail = rows.take(top.tail_log_prob).to(dtype)
    total = torch.logaddexp(log_p.logsumexp(-1), tail)  # 0 but for the rounding at capture
    return SparseTarget(index, log_p - total[:, None], tail - total)
