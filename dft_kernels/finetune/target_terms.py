"""The distribution terms that a Target of human writing gives, by name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..targets.target import Target
from ..terms import (
    AtMost,
    ChiSquared,
    DistributionTerm,
    Entropy,
    NGrams,
    PunctuationGap,
    PunctuationRate,
    ReferenceKL,
    SentenceLength,
    TermSum,
    TokenL2,
    UnigramKL,
    noise_floor,
)

_NGRAMS = 1024  # bigrams, the most frequent ones: completions are features of every row


def _padded(values: Tensor, vocab: int) -> Tensor:
    """[V, ...] of the tokenizer as [V, ...] of a head with padded ids."""
    return torch.cat([values, values.new_zeros(vocab - len(values), *values.shape[1:])])


def _smoothed(target: Target, vocab: int) -> Tensor:
    """Frequencies above 0: half a count more for every token of the vocabulary."""
    count = target.about.tokens or 1
    p = _padded(target["unigram"], vocab).double() * count + 0.5
    return p / p.sum()


def _classes(target: Target, vocab: int) -> tuple[Tensor, Tensor]:
    """[V, K] membership of the punctuation classes that the corpus has, and which of all K these are."""
    token, kind = target["punctuation_features"].long().T
    whole = torch.zeros(vocab, len(target["punctuation_rate"]))
    whole[token, kind] = 1.0
    there = (target["punctuation_rate"] > 0) & (whole != 0).any(0)
    return whole[:, there], there


def _rates(target: Target, vocab: int) -> DistributionTerm:
    classes, there = _classes(target, vocab)
    return PunctuationRate(classes, target["punctuation_rate"][there])


def _gaps(target: Target, vocab: int) -> DistributionTerm:
    classes, there = _classes(target, vocab)
    found = target["punctuation_gap"][there]
    known = found.sum(1) > 0
    return PunctuationGap(classes[:, known], lengths=found[known])


def _sentences(target: Target, vocab: int) -> DistributionTerm:
    return SentenceLength(_padded(target["sentence_end"], vocab), hazard=target["soft_hazard"])


def _bigrams(target: Target, vocab: int) -> DistributionTerm:
    sizes = target["ngram_starts"].diff().long()
    contexts = target["ngram_contexts"].repeat_interleave(sizes, 0)
    joint = target["ngram_context_probability"].repeat_interleave(sizes) * target["ngram_probability"]
    joint = torch.where(contexts[:, 0] < 0, joint, -1.0)
    kept = joint.topk(min(_NGRAMS, int((joint >= 0).sum()))).indices
    return NGrams(contexts[kept, 1].long(), target["ngram_completions"][kept].long(),
                  target["ngram_probability"][kept], vocab)  # fmt: skip


TERMS: dict[str, Callable[[Target, int], DistributionTerm]] = {
    "token_l2": lambda target, vocab: TokenL2(_padded(target["unigram"], vocab)),
    "chi_squared": lambda target, vocab: ChiSquared(_smoothed(target, vocab)),
    "unigram_kl": lambda target, vocab: UnigramKL(_smoothed(target, vocab)),
    "sentence_length": _sentences,
    "punctuation_rate": _rates,
    "punctuation_gap": _gaps,
    "ngrams": _bigrams,
    "calibration": lambda target, vocab: Entropy(calibration=True),
}


FLOOR = "floor"  # in place of a weight


class HumanText(NamedTuple):
    """What noise floors are taken of: input_ids and labels [S, T], and the rows that a running mean looks back on."""

    input_ids: Tensor
    target: Tensor
    rows: int


def terms_of(
    target: Target, weights: Sequence[str], vocab: int, text: HumanText | None = None, own_text: bool = False
) -> TermSum:
    """NAME=WEIGHT, ... as a sum of terms for a head of `vocab` tokens; NAME=floor is a constraint (`AtMost`) at the
    `noise_floor` of `text`. own_text: for the model's own, where there is reference_kl, and no calibration. ValueError
    for another name or weight, a statistic that the target lacks, or a vocabulary smaller than its."""
    if target.vocab_size is not None and target.vocab_size > vocab:
        raise ValueError(
            f"terms: the target must be of at most the model's {vocab} tokens, got {target.vocab_size}. Build it with "
            "the model's tokenizer."
        )
    known = {**TERMS, "reference_kl": lambda target, vocab: ReferenceKL()} if own_text else TERMS
    known = {name: make for name, make in known.items() if not (own_text and name == "calibration")}
    found = []
    for given in weights:
        name, _, weight = given.partition("=")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.0)[0]
            where = " of the model's own text" if own_text else ""
            raise ValueError(
                f"terms: {name} must be one of {', '.join(known)}{where}, got another. Did you mean {near}?"
            )
        if weight == FLOOR:
            found.append(1.0 * _at_floor(name, known[name](target, vocab), text))
            continue
        try:
            by = float(weight)
        except ValueError as error:
            raise ValueError(
                f"terms: {name} must come as {name}=WEIGHT or {name}={FLOOR}, got {given!r}. Write {name}=0.1."
            ) from error
        found.append(by * known[name](target, vocab))
    if not found:
        raise ValueError(f"terms: one term at least must be named, got none. There are {', '.join(known)}.")
    return TermSum([part for one in found for part in one.parts])


def _at_floor(name: str, term: DistributionTerm, text: HumanText | None) -> AtMost:
    bound = None if text is None else noise_floor(term, *text)[term.name]
    if bound is None or not 0 < bound < math.inf:  # KL from a text that lacks what the target has is infinite
        got = "none: it is not of the text alone" if bound is None else f"{bound:g}"
        raise ValueError(f"terms: {name}={FLOOR} must have a finite noise floor above 0, got {got}. Give it a weight.")
    return AtMost(term, bound)
