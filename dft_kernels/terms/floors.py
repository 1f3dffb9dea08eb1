"""The noise floor of a term: what human writing of a size is off by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import fail
from .base import Moments, Statistics, TermSum, as_sum
from .constraint import AtMost

_BATCH = 16  # sequences whose features [rows, K] are held at a time


@torch.no_grad()
def noise_floor(
    term: Any, input_ids: Tensor, target: Tensor, rows: int, draws: int = 16, seed: int = 0
) -> dict[str, float | None]:
    """Mean J of human text itself, by term: of `draws` random sets of sequences of about `rows` rows, where q_n is
    the token that stands there. The model's q has less noise than a token has, so that a model which writes like the
    text comes to this floor and below; with a decay, `Delayed` looks back on (1 + decay) / (1 - decay) steps' rows.

    input_ids, target: [S, T] int64 as in `Delayed.loss`, target -100 where a row is out. None for a term of the
    model's entropy or cross-entropy, of which a text tells nothing, and of whole texts. Weights of a sum count; an
    `AtMost` is its term. ValueError where the text is smaller than `rows`. Cost: counting; [16 T, K] memory.
    """
    parts = [(by, part.term if isinstance(part, AtMost) else part) for by, part in as_sum("noise_floor", term).parts]
    of_text = [not (part.entropy or part.divergence or part.reads) for _, part in parts]
    if input_ids.ndim != 2 or target.shape != input_ids.shape:
        got = f"{list(input_ids.shape)} and {list(target.shape)}"
        fail("noise_floor", "input_ids and target", "be [S, T] each", got, "Stack sequences of one length, padded")
    sizes = (target != -100).sum(1)
    if rows < 1 or int(sizes.sum()) < rows:
        got = f"{int(sizes.sum())} of them for rows={rows}"
        fail("noise_floor", "target", "hold as many labels as rows", got, "Give more text")
    found: dict[str, float | None] = dict.fromkeys(TermSum(parts).names)
    if not any(of_text):
        return found
    known = TermSum([part for part, there in zip(parts, of_text, strict=True) if there])
    known.on(input_ids.device)
    vocab = known.vocab if known.vocab is not None else int(target.max()) + 1
    draw = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(draws):
        order = torch.randperm(len(target), generator=draw).to(target.device)
        count = int(torch.searchsorted(sizes[order].cumsum(0), rows)) + 1
        some = order[:count]
        parts_of = [_moments(known, input_ids[at], target[at], vocab) for at in some.split(_BATCH)]
        moments = known.split(torch.stack([each.flat() for each in parts_of]).sum(0))
        values.append(torch.stack(known.values(moments)))
    mean = torch.stack(values).mean(0).tolist()
    return found | dict(zip([name for name, there in zip(found, of_text, strict=True) if there], mean, strict=True))


def _moments(terms: TermSum, input_ids: Tensor, target: Tensor, vocab: int) -> Moments:
    weight = (target != -100).double()
    labels = target.clamp(min=0)
    columns = torch.zeros(vocab, dtype=torch.float64, device=weight.device)
    columns.index_add_(0, labels.reshape(-1), weight.reshape(-1))
    features = None
    if terms.features is not None:
        features = terms.features.index_select(0, labels.reshape(-1)).to_dense().reshape(*labels.shape, -1)
    return terms.gathered(Statistics(input_ids, weight, columns, features))
