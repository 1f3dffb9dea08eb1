"""The log-probabilities that a server gives, checked, as rows of a `TopK`: k tokens and the mass of all others.

The tail's mass is 1 - s, s the sum of the probabilities that were given. A server makes them of its logits in fp32,
log p = z - lse(z): whatever dtype the logits were rounded to, they are a distribution, and all that s is off by is the
rounding of that log-softmax. Nearly all of it is lse's, a factor that all probabilities share, so that s is off by
s e <= e, with e = ROUNDING: vLLM's log-probabilities over all 49152 tokens summed to 1 + 1.2e-5 at most on a CPU.
So 1 - s is the tail's mass to within e, a relative error of e / (1 - s). From this the rule:

    tail = max(1 - s, e)            never 0, where reverse KL would be infinite, and never negative
    flagged where tail < 10 e       known to worse than 10 %: counted; KL is then off by about e |log(tail / q_tail)|
    refused where s > 1 + 10 e      no distribution, or one that is rounded too much for 1 - s to mean anything

A token that was given and is not kept joins the tail by its own probability. Then all k + 1 outcomes are divided by
their sum, 1 but for the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import shown
from .served_protocols import Row, WrongReplyError

ROUNDING = 3e-5  # of a sum of probabilities, at most
_SERIAL = 1 << 15  # elements that torch works on without threads of its own


class Distributions(NamedTuple):
    """Those of the tokens of a sequence after its first: row t is over token t + 1."""

    indices: Tensor  # [L - 1, k] int64
    log_probs: Tensor  # [L - 1, k] fp32, falling
    tail: Tensor  # [L - 1] fp32, log of the mass outside
    flagged: int  # rows whose tail is known to worse than 10 %


def distributions(rows: list[Row], tokens: Sequence[int], k: int, vocab: int | None) -> Distributions:
    """The rows of tokens[1:]. The k likeliest tokens are kept; where the row's own is none of them, it takes the place
    of the last. vocab: ids lie below it, where it is known. WrongReplyError names the row."""
    step = max(1, _SERIAL // (k + 1))
    parts = [
        _part(rows[start : start + step], torch.tensor(tokens[start + 1 : start + 1 + step]), k, vocab, start)
        for start in range(0, len(rows), step)
    ]
    return Distributions(
        torch.cat([part.indices for part in parts]),
        torch.cat([part.log_probs for part in parts]),
        torch.cat([part.tail for part in parts]),
        sum(part.flagged for part in parts),
    )


def _part(rows: list[Row], own: Tensor, k: int, vocab: int | None, first: int) -> Distributions:
    index, log_p, there = _padded(rows, k, first)

    def refuse(wrong: Tensor, relation: str, got: Callable[[int], object]) -> None:
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            raise WrongReplyError(f"row {first + row}", relation, got(row))

    outside = there & ((index < 0) | (index >= (vocab or torch.iinfo(torch.int64).max)))
    below = "" if vocab is None else f" and below {vocab} (vocab_size)"
    refuse(outside.any(-1), f"hold ids of at least 0{below}", lambda row: int(index[row][outside[row]][0]))
    ordered = index.sort(-1).values
    refuse((ordered[:, 1:] == ordered[:, :-1]).any(-1), "hold distinct ids", lambda row: f"{ordered[row].tolist()[:8]}")
    refuse(~(index == own[:, None]).any(-1), "hold the row's own token, the next one that was asked for",
           lambda row: f"others than {int(own[row])}")  # fmt: skip
    wrong = there & ~(log_p.isfinite() & (log_p <= ROUNDING))
    refuse(wrong.any(-1), "hold finite log-probabilities of at most 0", lambda row: float(log_p[row][wrong[row]][0]))
    total = log_p.exp().sum(-1)
    refuse(total > 1 + 10 * ROUNDING, "sum to at most 1 in probability", lambda row: float(total[row]))

    log_p, order = log_p.sort(dim=-1, descending=True, stable=True)
    index = index.gather(1, order)
    last = index[:, k] == own  # the row's own token, the least likely of those given
    dropped = torch.where(last, log_p[:, k - 1], log_p[:, k])
    index[:, k - 1] = torch.where(last, index[:, k], index[:, k - 1])
    log_p[:, k - 1] = torch.where(last, log_p[:, k], log_p[:, k - 1])
    index, log_p = index[:, :k], log_p[:, :k].clamp(max=0.0)
    tail = (1.0 - total).clamp(min=ROUNDING) + dropped.exp()
    scale = (log_p.exp().sum(-1) + tail).log()
    flagged = int((tail < 10 * ROUNDING).sum())
    return Distributions(index, (log_p - scale[:, None]).float(), (tail.log() - scale).float(), flagged)


def _padded(rows: list[Row], k: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and which of them there are [R, k + 1]; rows have k entries or one more."""
    ids: list[list[int]] = []
    log_probs: list[list[float]] = []
    for number, (own_ids, own_log_probs) in enumerate(rows, first):
        count = len(own_ids)
        if count not in (k, k + 1) or len(own_log_probs) != count:
            got = f"{count} ids and {len(own_log_probs)} log-probabilities"
            raise WrongReplyError(f"row {number}", f"hold the {k} likeliest tokens and its own", got)
        ids.append(own_ids if count > k else [*own_ids, -1])
        log_probs.append(own_log_probs if count > k else [*own_log_probs, -torch.inf])
    try:
        there = torch.ones(len(rows), k + 1, dtype=torch.bool)
        there[:, k] = torch.tensor([len(own_ids) > k for own_ids, _ in rows])
        return torch.tensor(ids), torch.tensor(log_probs, dtype=torch.float64), there
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise _not_numbers(rows, first) from None


def _not_numbers(rows: list[Row], first: int) -> WrongReplyError:
    def wrong(value: Any, kinds: tuple[type, ...]) -> bool:
        return type(value) not in kinds or (type(value) is int and abs(value) >= 1 << 63)

    for number, (ids, log_probs) in enumerate(rows, first):
        found = [one for one in ids if wrong(one, (int,))] + [one for one in log_probs if wrong(one, (int, float))]
        if found:
            return WrongReplyError(f"row {number}", "hold ids and numbers", shown(found[0]))
    return WrongReplyError(f"rows {first} to {first + len(rows) - 1}", "hold ids and numbers", "others")
