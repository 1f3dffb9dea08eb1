"""How much likelier a target makes each kind of token than a model's own writing does, given the text so far.

Two Targets of one tokenizer, `target` and `native` (how the model writes as it is: `dft-kernels gap --own`), and a
state that both know, as the number of tokens since the last sentence end: the log odds ratio

    delta = logit P_target(f | state) - logit P_native(f | state)

is what the model's odds of f are to be multiplied by, wherever it finds itself in this state: among all ways to move
the mean over contexts, a factor of the odds is the one closest to the model in KL (Csiszar, Annals of Probability 3(1),
1975: an I-projection is an exponential family's). What the model knows of the context stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..targets.blend import at_risk
from ..targets.punctuation import CLASSES
from ..targets.target import Target

PRIOR = 60.0  # tokens that the ratio of all states together counts for, in each
LIMIT = 2.0  # of a log odds ratio
NAMES = ("sentence end", *CLASSES)
F = len(NAMES)


def ratios(target: Target, native: Target) -> Tensor:
    """delta [F, A + 1] of a sentence end and of a mark of each class, by the tokens since the last one, and for no such
    mark yet. Both are taken for as large as the smaller of them; states are pooled with those around them, a quarter of
    their number to each side, and each counts with PRIOR tokens of the ratio of all states together."""
    sides, tokens = [], min(one.about.tokens or 0 for one in (target, native))
    opened = all("mark_hazard" in one.tensors for one in (target, native))
    for one in (target, native):
        events, risk = (_pooled(x) for x in _counts(one, tokens, opened))
        overall = rates(one).double()[:, None]
        hazard = (events + PRIOR * overall) / (risk + PRIOR)
        sides.append(hazard.clamp(1e-5, 1 - 1e-5).logit())
    return (sides[0] - sides[1]).clamp(-LIMIT, LIMIT).float()


def _counts(one: Target, tokens: int, opened: bool) -> tuple[Tensor, Tensor]:
    """Events and tokens at risk [F, A + 1] of so many tokens. opened: of gaps as far as they go; of whole ones for
    targets of which one has no others, as one that was built before, or blended log-linearly."""
    if opened:
        risk = one["mark_risk"].double() * tokens
        return one["mark_hazard"].double() * risk, risk
    of_ends = at_risk(one) / at_risk(one).sum() * tokens
    marks = one["punctuation_gap"].double() * (one["punctuation_rate"].double() * tokens)[:, None]
    events = torch.cat([(one["hazard"].double() * of_ends)[None], marks])
    risk = torch.cat([of_ends[None], marks.flip(1).cumsum(1).flip(1)])
    none = torch.zeros(F, 1, dtype=torch.float64)
    return torch.cat([events, none], 1), torch.cat([risk, none], 1)


def rates(one: Target) -> Tensor:
    """Shares of the tokens that end a sentence and that hold a mark of each class [F]."""
    end = (one["unigram"].double() * one["sentence_end"].double()).sum().reshape(1)
    return torch.cat([end, one["punctuation_rate"].double()]).float()


def _pooled(values: Tensor) -> Tensor:
    """[F, A + 1], the last bin on its own."""
    at = torch.arange(values.shape[1] - 1)
    reach = (at // 4).clamp(max=16)
    near = ((at[:, None] - at[None, :]).abs() <= reach[:, None]).double()
    return torch.cat([values[:, :-1] @ near.t(), values[:, -1:]], 1)


def features(target: Target) -> Tensor:
    """[V, F] dense: the share of a token's occurrences that end a sentence, and which classes its text holds."""
    found = torch.zeros(len(target["sentence_end"]), F)
    found[:, 0] = target["sentence_end"]
    token, kind = target["punctuation_features"].long().T
    found[token, kind + 1] = 1.0
    return found
