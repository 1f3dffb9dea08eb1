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


def end_ratio(target: Target, native: Target) -> Tensor:
    """delta of a sentence end by age [A]: of the soft hazards, since <q, sentence_end> is what a model has."""
    sides = []
    for one in (target, native):
        risk = at_risk(one) / at_risk(one).sum() * (one.about.tokens or 0)
        sides.append((one["soft_hazard"].double() * risk, risk))
    return _ratio(*sides)


def gap_ratios(target: Target, native: Target) -> Tensor:
    """delta of a mark of each class by the tokens since the last one of it [K, G]."""
    sides = []
    for one in (target, native):
        gaps = one["punctuation_gap"].double()
        marks = (one["punctuation_rate"].double() * (one.about.tokens or 0))[:, None]
        ended = gaps * marks
        sides.append((ended, ended.flip(1).cumsum(1).flip(1)))
    return _ratio(*sides)


def rate_ratio(target: Target, native: Target) -> Tensor:
    """delta of each feature [F] whatever the state."""
    sides = []
    for one in (target, native):
        least = 0.5 / max(one.about.tokens or 1, 1)  # half an occurrence
        sides.append(rates(one).double().clamp(least, 1 - least).logit())
    return (sides[0] - sides[1]).clamp(-LIMIT, LIMIT).float()


def rates(one: Target) -> Tensor:
    """Shares of the tokens that end a sentence and that hold a mark of each class [F]."""
    end = (one["unigram"].double() * one["sentence_end"].double()).sum().reshape(1)
    return torch.cat([end, one["punctuation_rate"].double()]).float()


def _ratio(target: tuple[Tensor, Tensor], native: tuple[Tensor, Tensor]) -> Tensor:
    """Log odds ratios by state (the last dimension) of events and tokens at risk. States are pooled with those around
    them, a quarter of their number to each side, and each with PRIOR tokens of the ratio of all states."""
    sides = []
    for events, risk in (target, native):
        events, risk = _pooled(events), _pooled(risk)
        overall = events.sum(-1, keepdim=True) / risk.sum(-1, keepdim=True).clamp_min(1e-300)
        sides.append(((events + PRIOR * overall) / (risk + PRIOR)).clamp(1e-6, 1 - 1e-6).logit())
    return (sides[0] - sides[1]).clamp(-LIMIT, LIMIT).float()


def _pooled(values: Tensor) -> Tensor:
    size = values.shape[-1]
    at = torch.arange(size)
    reach = (at // 4).clamp(max=16)
    near = ((at[:, None] - at[None, :]).abs() <= reach[:, None]).double()
    return values.double() @ near.T


def features(target: Target) -> Tensor:
    """[V, F] dense: the share of a token's occurrences that end a sentence, and which classes its text holds."""
    found = torch.zeros(len(target["sentence_end"]), F)
    found[:, 0] = target["sentence_end"]
    token, kind = target["punctuation_features"].long().T
    found[token, kind + 1] = 1.0
    return found
