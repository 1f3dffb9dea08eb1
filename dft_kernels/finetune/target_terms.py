"""The distribution terms that a Target of human writing gives, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..targets.target import Target
from ..terms import (
    ChiSquared,
    DistributionTerm,
    Entropy,
    NGrams,
    PunctuationGap,
    PunctuationRate,
    SentenceLength,
    TermSum,
    TokenL2,
    UnigramKL,
)

_NGRAMS = 4096  # bigrams, the most frequent ones: completions are features of every row


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


def terms_of(target: Target, weights: Sequence[str], vocab: int) -> TermSum:
    """NAME=WEIGHT, ... as a sum of terms for a head of `vocab` tokens. ValueError for another name or weight, a
    statistic that the target lacks, or a vocabulary smaller than its."""
    if target.vocab_size is not None and target.vocab_size > vocab:
        raise ValueError(
            f"terms: the target must be of at most the model's {vocab} tokens, got {target.vocab_size}. Build it with "
            "the model's tokenizer."
        )
    found = []
    for given in weights:
        name, _, weight = given.partition("=")
        if name not in TERMS:
            near = difflib.get_close_matches(name, TERMS, 1, 0.0)[0]
            raise ValueError(f"terms: {name} must be one of {', '.join(TERMS)}, got another. Did you mean {near}?")
        try:
            by = float(weight)
        except ValueError as error:
            raise ValueError(f"terms: {name} must come as {name}=WEIGHT, got {given!r}. Write {name}=0.1.") from error
        found.append(by * TERMS[name](target, vocab))
    if not found:
        raise ValueError(f"terms: one term at least must be named, got none. There are {', '.join(TERMS)}.")
    return TermSum([part for one in found for part in one.parts])
